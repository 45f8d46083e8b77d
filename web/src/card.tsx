// The head card: what a head does, the evidence for it, all its scores, what its weights read and write.
import { useState } from "preact/hooks";
import { InPlans } from "./inplans";
import { Rungs } from "./ladder";
import { LADDER, type Claim, type Readout } from "./data";
import { headOf, rankOf, rankText, type State } from "./state";
import { Copy, RoleChip, Token, Verdict } from "./small";
import { Provenance } from "./provenance";
import { number, span, title } from "./words";

export function Card({ state }: { state: State }) {
  const unit = state.unit.value;
  const head = headOf(state, unit);
  if (!head) return <section class="hw-panel hw-card"><h2 tabIndex={-1}>No head</h2><p class="hw-quiet">This atlas holds no heads yet.</p></section>;
  const strength = { proved: 0, unknown: 1, refuted: 2 };
  const claims = [...(state.data.claims[unit] ?? [])].sort((a, b) => strength[a.verdict] - strength[b.verdict] || passed(b) - passed(a));
  return (
    <section class="hw-panel hw-card" aria-label={`Head ${unit}`}>
      <div class="hw-bar">
        <h2 tabIndex={-1}>{unit}</h2>
        {head.role !== "unknown" && <RoleChip role={head.role} verdict={head.verdict} />}
        <Verdict verdict={head.verdict} />
        <span class="hw-space" />
        <Copy text={() => location.href.split("#")[0] + "#" + unit}>Copy link</Copy>
      </div>
      <p class="hw-sentence">{head.sentence}</p>
      {state.data.does[head.role] && <p class="hw-quiet">Such a head {state.data.does[head.role]}.</p>}
      <h3>Evidence</h3>
      {!claims.length && <p class="hw-quiet">No claim about this head was tested.{state.data.scores.length > 0 && " Its scores are below."}</p>}
      {claims.map((claim, i) => (i === 0 ? <Tested state={state} claim={claim} /> : (
        <details class="hw-more">
          <summary>As {claim.role} head: {claim.verdict}</summary>
          <Tested state={state} claim={claim} />
        </details>
      )))}
      <Scores state={state} />
      <InPlans state={state} />
      <Readouts state={state} />
      <Code state={state} />
      <Provenance state={state} />
    </section>
  );
}

const passed = (claim: Claim) => claim.rungs.filter((rung) => rung.passed).length;

function Tested({ state, claim }: { state: State; claim: Claim }) {
  const how = (step: string) => {
    const mine = claim.rungs.filter((rung) => rung.step === step);
    return !mine.length ? "untested" : mine.some((rung) => rung.passed) ? "passed" : "failed";
  };
  return (
    <>
      <ol class="hw-ladder" aria-label={`Ladder of evidence for ${claim.role}`}>
        {LADDER.map((step) => <li class={`hw-step-${how(step)}`}><span>{step}</span><small>{how(step)}</small></li>)}
      </ol>
      <Rungs state={state} claim={claim} />
    </>
  );
}

const FEW = 8;

function Scores({ state }: { state: State }) {
  const i = state.place.get(state.unit.value)!;
  const { scores } = state.data;
  const [all, showAll] = useState(false);
  if (!scores.length) return null;
  const order = [...scores].sort((a, b) => (rankOf(b, i)?.share ?? -1) - (rankOf(a, i)?.share ?? -1));
  const shown = all ? order : order.slice(0, FEW);
  return (
    <>
      <h3>Scores</h3>
      <div class="hw-wide" tabIndex={0} role="region" aria-label="Scores of this head">
        <table class="hw-table">
          <thead><tr><th scope="col">Score</th><th scope="col">Rung</th><th scope="col" class="hw-number">Value</th><th scope="col">95 % interval</th><th scope="col" colSpan={2}>Rank, 1 is highest</th></tr></thead>
          <tbody>
            {shown.map((score) => {
              const rank = rankOf(score, i);
              return (
                <tr class={score.name === state.colour.value ? "hw-here" : ""}>
                  <th scope="row">
                    <button type="button" class="hw-link" title="Colour the map by this score" onClick={() => { state.colour.value = score.name; }}>{title(score.name)}</button>
                  </th>
                  <td class="hw-quiet">{score.evidence}</td>
                  <td class="hw-number">{number(score.value[i])}</td>
                  <td class="hw-quiet hw-nowrap">{span(score.low[i]!, score.high[i]!)}</td>
                  <td class="hw-number">{rankText(rank)}</td>
                  <td class="hw-rank" aria-hidden="true">{rank && <span><i style={{ width: `${(100 * rank.share).toFixed(1)}%` }} /></span>}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {scores.length > FEW && (
        <button type="button" class="hw-link hw-small" onClick={() => showAll(!all)}>{all ? `Only the ${FEW} where this head ranks highest` : `All ${scores.length} scores`}</button>
      )}
    </>
  );
}

const CIRCUITS: Record<string, [name: string, text: string]> = {
  ov: ["Writes (OV)", "When it looks at the token on the left, it raises the tokens on the right."],
  qk: ["Looks for (QK)", "From the token on the left, it looks for the tokens on the right."],
};

function Readouts({ state }: { state: State }) {
  const found = state.data.readouts[state.unit.value];
  if (!found) return null;
  return (
    <>
      <h3>Read from the weights</h3>
      <div class="hw-circuits">
        {Object.entries(found).map(([circuit, list]) => (
          <div>
            <h4>{CIRCUITS[circuit]?.[0] ?? circuit}</h4>
            <p class="hw-quiet">{CIRCUITS[circuit]?.[1] ?? ""}</p>
            <table class="hw-table hw-tokens-table">
              <caption class="hw-hidden">{CIRCUITS[circuit]?.[0] ?? circuit} of {state.unit.value}</caption>
              <tbody>{[...grouped(list)].slice(0, 8).map(([source, targets]) => <Line source={source} targets={targets.slice(0, 5)} />)}</tbody>
            </table>
          </div>
        ))}
      </div>
    </>
  );
}

function grouped(list: Readout[]): Map<string, Readout[]> {
  const found = new Map<string, Readout[]>();
  for (const row of list) found.set(row[0], [...(found.get(row[0]) ?? []), row]);
  return found;
}

function Line({ source, targets }: { source: string; targets: Readout[] }) {
  return (
    <tr>
      <th scope="row"><span class="hw-piece"><Token text={source} /></span></th>
      <td>{targets.map(([, target, value]) => <span class="hw-piece" title={number(value)}><Token text={target} /></span>)}</td>
      <td class="hw-number hw-quiet">{number(targets[0]?.[2])}</td>
    </tr>
  );
}

export function codeFor(state: State): string {
  const unit = state.unit.value;
  const i = state.place.get(unit)!;
  const ranked = state.data.scores.filter((one) => one.code && one.kind === "head" && one.value[i] !== null);
  ranked.sort((a, b) => (rankOf(b, i)?.share ?? -1) - (rankOf(a, i)?.share ?? -1));
  const score = state.data.scores.find((one) => one.name === state.colour.value) ?? ranked[0] ?? state.data.scores[0];
  const lines = ["from headwise.atlas import Atlas", "", `atlas = Atlas(${JSON.stringify(state.data.atlas)})`, `print(atlas.claims(unit="${unit}"))`];
  if (!score) return lines.join("\n");
  const key = score.kind === "head" ? unit : undefined;
  if (key) lines.push(`print(atlas.score("${score.name}")["${key}"])`);
  if (score.code) {
    lines.push("", `# ${title(score.name)}, made again`, score.code, "print(again" + (key ? `["${key}"]` : ".frame()") + ")");
  }
  return lines.join("\n");
}

function Code({ state }: { state: State }) {
  const text = codeFor(state);
  return (
    <details class="hw-more">
      <summary>The same in Python</summary>
      <div class="hw-code">
        <pre tabIndex={0}><code>{text}</code></pre>
        <Copy text={() => text}>Copy as code</Copy>
      </div>
    </details>
  );
}
