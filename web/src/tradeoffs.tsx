// Trade-offs: the quality of every cache that was tried, against its bytes and against its time. One dot a cache.
import { useState } from "preact/hooks";
import { KeyMark, Chart, isHollow } from "./dots";
import type { Dot, Plan, Tradeoffs } from "./data";
import { BYTES, dotSentence, KINDS, nameOf, planOfDot, QUALITIES, selectedDot, shownDot, size, TIMES, tokens, treatments, verdictOf, type Axis } from "./plans";
import { Choice } from "./small";
import type { State } from "./state";
import { number, percent, title } from "./words";

export function TradeoffsPanel({ state, empty }: { state: State; empty?: string }) {
  const held = state.data.tradeoffs;
  if (!held) return empty ? <section class="hw-panel hw-tradeoffs" aria-label="Trade-offs"><div class="hw-bar"><h2>Trade-offs</h2></div><p class="hw-quiet">{empty}</p></section> : null;
  return <Panel state={state} held={held} />;
}

function Panel({ state, held }: { state: State; held: Tradeoffs }) {
  const { dots } = held;
  const lengths = [...new Set(dots.map((dot) => dot.at))].sort((a, b) => a - b);
  const [length, setLength] = useState(0);
  const times = Object.entries(TIMES).filter(([, axis]) => dots.some((dot) => dot[axis.field] !== null));
  const [time, setTime] = useState(times[0]?.[0] ?? "");
  const y = QUALITIES[state.quality.value] ?? QUALITIES.kept!;
  const shown = dots.filter((dot) => !length || dot.at === length);
  return (
    <section class="hw-panel hw-tradeoffs" aria-label="Trade-offs">
      <div class="hw-bar">
        <h2>Trade-offs</h2>
        <label class="hw-field">
          <span>Quality</span>
          <select value={state.quality.value} onChange={(event) => { state.quality.value = event.currentTarget.value; }}>
            {Object.entries(QUALITIES).map(([name, axis]) => <option value={name}>{axis.title}</option>)}
          </select>
        </label>
        {lengths.length > 1 && (
          <label class="hw-field">
            <span>Measured at</span>
            <select value={String(length)} onChange={(event) => setLength(Number(event.currentTarget.value))}>
              <option value="0">all lengths</option>
              {lengths.map((at) => <option value={String(at)}>{tokens(at)}</option>)}
            </select>
          </label>
        )}
        <span class="hw-space" />
        {times.length > 1 && <Choice label="Time of" value={time} options={[["decode_ms", "New token"], ["prefill_s", "Prompt"]]} onPick={setTime} />}
      </div>
      {dots.length > 0 && (
        <div class="hw-charts">
          <Against state={state} dots={shown} x={BYTES} y={y} none="No cache was measured so." />
          {times.length > 0 && <Against state={state} dots={shown} x={TIMES[time] ?? TIMES.decode_ms!} y={y} none={`No answers were measured together with times${length ? ` at ${tokens(length)}` : ""}.`} />}
        </div>
      )}
      <Legend state={state} dots={dots} />
      <Line state={state} />
      <Numbers state={state} />
      <Table state={state} dots={shown} />
      <LeftOut held={held} />
    </section>
  );
}

function Against({ state, dots, x, y, none }: { state: State; dots: Dot[]; x: Axis; y: Axis; none: string }) {
  const placed = dots.filter((dot) => dot[x.field] !== null && dot[y.field] !== null);
  return placed.length ? <Chart state={state} dots={placed} x={x} y={y} /> : <p class="hw-quiet hw-small">{none}</p>;
}

function Legend({ state, dots }: { state: State; dots: Dot[] }) {
  const kinds = (Object.keys(KINDS) as Dot["kind"][]).filter((kind) => dots.some((dot) => dot.kind === kind));
  const hollow = dots.some((dot) => isHollow(state, dot));
  return (
    <p class="hw-key">
      {kinds.map((kind) => (
        <>
          <span><KeyMark kind={kind} /> {KINDS[kind].title}</span>
          {kind === "plan" && hollow && <span><KeyMark kind="plan" hollow /> plan that no trial accepted</span>}
        </>
      ))}
    </p>
  );
}

/** What is under the pointer, else what is selected. The line keeps its place, so nothing jumps. */
function Line({ state }: { state: State }) {
  const dot = shownDot(state);
  return <p class="hw-reading">{dot ? dotSentence(state, dot) : "Point at a plan: the map shows which KV heads it keeps in full. Press it for the numbers."}</p>;
}

function Numbers({ state }: { state: State }) {
  const dot = selectedDot(state);
  if (!dot) return null;
  const plan = planOfDot(state, dot);
  const facts: [string, string][] = [
    ["answers kept", dot.kept === null ? "not measured" : `${percent(dot.kept)} of those that the full cache gets right`],
    ["answers right", dot.retrieval === null ? "not measured" : percent(dot.retrieval)],
    ...Object.entries(dot.accuracy).map(([task, right]): [string, string] => [`${title(task)}`, `${right === null ? "-" : percent(right)}${dot.n[task] ? ` of ${dot.n[task]} answers` : ""}`]),
    ["held-out text", dot.nll === null ? "not measured" : `${number(dot.nll)} nats a token`],
    ["bytes", `${size(dot.bytes)}${dot.share === null ? "" : `, ${percent(dot.share)} of the full cache's`}, at ${tokens(dot.at)}`],
  ];
  if (dot.prefill_s !== null) facts.push(["reading the prompt", `${number(dot.prefill_s)} s`]);
  if (dot.decode_ms !== null) facts.push(["a new token", `${number(dot.decode_ms)} ms`]);
  if (dot.peak_mb !== null) facts.push(["peak of the process", `${number(dot.peak_mb)} MiB`]);
  const own = dot.kind === "plan" && plan;
  return (
    <div class="hw-numbers">
      <div class="hw-bar">
        <h3 tabIndex={-1}>{nameOf(state, dot)}</h3>
        <span class="hw-space" />
        <button type="button" class="hw-button" onClick={() => { state.dot.value = ""; }}>Close</button>
      </div>
      {own && own.says && <p>{own.says}</p>}
      <dl class="hw-facts">
        {facts.map(([name, text]) => <div><dt>{name}</dt><dd>{text}</dd></div>)}
        {own && <PlanFacts plan={own} />}
      </dl>
    </div>
  );
}

function PlanFacts({ plan }: { plan: Plan }) {
  const full = Object.entries(plan.heads).filter(([, name]) => plan.legend[name]?.all).map(([unit]) => unit);
  const chosen = plan.about.ranking;
  return (
    <>
      <div><dt>KV heads</dt><dd>{treatments(plan).map((one) => `${one.count} ${one.text}`).join("; ")}</dd></div>
      {typeof chosen === "string" && <div><dt>heads chosen by</dt><dd>{title(chosen)}</dd></div>}
      {full.length > 0 && <div><dt>kept in full</dt><dd>{full.join(", ")}</dd></div>}
      <div><dt>trial</dt><dd>{verdictOf(plan) ? `${verdictOf(plan)}. The rule: ${plan.rule}` : "none was run"}</dd></div>
    </>
  );
}

const COLUMNS: [name: string, text: (dot: Dot) => string][] = [
  ["Tokens", (dot) => dot.at.toLocaleString("en")],
  ["Bytes", (dot) => size(dot.bytes)],
  ["Of full", (dot) => (dot.share === null ? "-" : percent(dot.share))],
  ["Answers kept", (dot) => (dot.kept === null ? "-" : percent(dot.kept))],
  ["Answers right", (dot) => (dot.retrieval === null ? "-" : percent(dot.retrieval))],
  ["Nats a token", (dot) => number(dot.nll)],
  ["ms a token", (dot) => number(dot.decode_ms)],
  ["Prompt, s", (dot) => number(dot.prefill_s)],
];

/** The twin of the dots: also those without a place in a plot. */
function Table({ state, dots }: { state: State; dots: Dot[] }) {
  return (
    <details class="hw-more">
      <summary>All {dots.length} as a table</summary>
      <div class="hw-wide" tabIndex={0} role="region" aria-label="Table of caches">
        <table class="hw-table">
          <thead><tr><th scope="col">Cache</th>{COLUMNS.map(([name]) => <th scope="col" class="hw-number">{name}</th>)}</tr></thead>
          <tbody>
            {dots.map((dot) => (
              <tr class={dot.key === state.dot.value ? "hw-here" : ""}>
                <th scope="row"><button type="button" class="hw-link" onClick={() => { state.dot.value = dot.key; }}>{nameOf(state, dot)}</button></th>
                {COLUMNS.map(([, text]) => <td class="hw-number">{text(dot)}</td>)}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

function LeftOut({ held }: { held: Tradeoffs }) {
  const rows = Object.entries(held.left_out);
  if (!rows.length) return null;
  return (
    <details class="hw-more">
      <summary>Plans left out: {rows.length}</summary>
      <dl class="hw-facts">{rows.map(([name, reason]) => <div><dt>{name}</dt><dd>{reason}</dd></div>)}</dl>
    </details>
  );
}
