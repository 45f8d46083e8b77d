// Training: a number against the step, one line a head; below it the whole model. What was held is shaded, phases marked.
import * as Plot from "@observablehq/plot";
import { useEffect, useRef, useState } from "preact/hooks";
import { dark, sequential } from "./colour";
import type { Curve, Training } from "./data";
import { Copy } from "./small";
import type { State } from "./state";
import { number, title } from "./words";

export function TrainingPanel({ state, empty }: { state: State; empty?: string }) {
  const held = state.training.value;
  if (!held) return empty ? <section class="hw-panel hw-training" aria-label="Training"><div class="hw-bar"><h2>Training</h2></div><p class="hw-quiet">{empty}</p></section> : null;
  return <Panel state={state} held={held} />;
}

const nameOf = (curve: Curve) => `${curve.metric}@${curve.split}`;

/** Names of what heads have, or, where they have nothing, of what the whole model has. */
function choices(held: Training): string[] {
  const all = (some: (curve: Curve) => boolean) => [...new Set(held.curves.filter(some).map(nameOf))];
  const heads = all((curve) => curve.unit !== "");
  return heads.length ? heads : all(() => true);
}

function Panel({ state, held }: { state: State; held: Training }) {
  const [over, setOver] = useState("");
  const names = choices(held);
  const shown = names.includes(state.curve.value) ? state.curve.value : names[0]!;
  const lines = held.curves.filter((curve) => nameOf(curve) === shown && curve.unit !== "");
  const whole = held.curves.filter((curve) => curve.unit === "" && curve.split === (shown.split("@")[1] ?? ""));
  const loss = [whole.find((curve) => curve.metric === "loss") ?? whole[0]].filter((curve) => curve !== undefined);
  const lit = over || state.unit.value;
  const pick = (unit: string) => { if (state.place.has(unit)) state.unit.value = unit; };
  const [metric, split] = shown.split("@");
  return (
    <section class="hw-panel hw-training" aria-label="Training">
      <div class="hw-bar">
        <h2>Training</h2>
        <span class="hw-quiet hw-small">{held.name}</span>
        <span class="hw-space" />
        <label class="hw-field">
          <span>Number</span>
          <select value={shown} onChange={(event) => { state.curve.value = event.currentTarget.value; }}>
            {names.map((name) => <option value={name}>{title(name.replace("@", " on "))}</option>)}
          </select>
        </label>
      </div>
      {lines.length > 0 && <Lines held={held} curves={lines} label={`${title(metric!)}, one line a head`} height={250} lit={lit} onOver={setOver} onPick={pick} />}
      {loss.length > 0 && <Lines held={held} curves={loss} label={`${title(loss[0]!.metric)} of the whole model`} height={120} lit="" onOver={() => setOver("")} onPick={() => {}} />}
      <p class="hw-reading">{sentence(lines.find((curve) => curve.unit === lit), loss[0])}</p>
      <Legend held={held} curves={[...lines, ...loss]} />
      <Table state={state} curves={lines.length ? lines : loss} pick={pick} />
      <details class="hw-more">
        <summary>The same in Python</summary>
        <Code text={`${held.code}\nprint(${call(held, metric!, split ?? "", lines.some((one) => one.unit === state.unit.value) ? state.unit.value : lines[0]?.unit ?? "")})`} />
      </details>
    </section>
  );
}

const call = (held: Training, metric: string, split: string, unit: string) =>
  held.call.replaceAll("METRIC", () => JSON.stringify(metric)).replaceAll("SPLIT", () => JSON.stringify(split)).replaceAll("UNIT", () => JSON.stringify(unit));

function Code({ text }: { text: string }) {
  return (
    <div class="hw-code">
      <pre tabIndex={0}><code>{text}</code></pre>
      <Copy text={() => text}>Copy as code</Copy>
    </div>
  );
}

const last = (curve: Curve) => curve.values.at(-1) ?? null;
const phaseText = (curve: Curve) => (curve.phase ? `half of its change between steps ${curve.phase[0].toLocaleString("en")} and ${curve.phase[1].toLocaleString("en")}` : "no sudden change");

function sentence(curve: Curve | undefined, loss: Curve | undefined): string {
  const parts = [
    curve && `${curve.unit}: ${title(curve.metric)} ${number(curve.values[0] ?? null)} at first, ${number(last(curve))} in the end, ${phaseText(curve)}`,
    loss && `${title(loss.metric)} ${number(loss.values[0] ?? null)} to ${number(last(loss))}, ${phaseText(loss)}`,
  ];
  return `${parts.filter(Boolean).join(". ")}.`;
}

/** The phase that is marked: that of the whole model, else of the head that changes most. */
function marked(curves: Curve[]): [number, number] | null {
  const reach = (curve: Curve) => { const y = curve.values.filter((v): v is number => v !== null); return Math.max(...y) - Math.min(...y); };
  return [...curves].filter((curve) => curve.phase).sort((a, b) => reach(b) - reach(a))[0]?.phase ?? null;
}

function Lines({ held, curves, label, height, lit, onOver, onPick }: {
  held: Training; curves: Curve[]; label: string; height: number; lit: string; onOver: (unit: string) => void; onPick: (unit: string) => void;
}) {
  const box = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(640);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(240, Math.round(entry!.contentRect.width))));
    watch.observe(box.current!);
    return () => watch.disconnect();
  }, []);
  const side = { left: 48, right: 58 };
  const points = curves.flatMap((curve) => curve.steps.map((step, i) => ({ unit: curve.unit, step, value: curve.values[i] ?? null })).filter((one) => one.value !== null));
  const night = dark.value;
  useEffect(() => {
    const spans = held.held.flatMap((one) => one.spans ?? []).map(([from, to]) => ({ from, to }));
    const phase = marked(curves);
    const strongest = [...curves].sort((a, b) => Math.abs(last(b) ?? 0) - Math.abs(last(a) ?? 0)).slice(0, 4);
    const named = curves.length > 1 ? curves.filter((curve) => strongest.includes(curve) || curve.unit === lit) : [];
    const inks = new Map(curves.map((curve) => [curve.unit, ink(curve.unit, curves)]));
    const figure = Plot.plot({
      width,
      height,
      marginLeft: side.left,
      marginRight: side.right,
      marginBottom: 30,
      style: { background: "none", color: "var(--hw-quiet)", fontSize: "11px", fontFamily: "inherit" },
      x: { label: "step \u2192", domain: held.steps },
      y: { label: `\u2191 ${label}`, grid: true, nice: true, ticks: height < 200 ? 3 : 5 },
      marks: [
        Plot.rectX(spans, { x1: "from", x2: "to", fill: "var(--hw-attend)", fillOpacity: 0.25 }),
        ...(phase ? [Plot.rectX([phase], { x1: (d) => d[0], x2: (d) => d[1], fill: "var(--hw-accent)", fillOpacity: 0.14 }), Plot.ruleX(phase, { stroke: "var(--hw-accent)", strokeDasharray: "3 3" })] : []),
        Plot.line(points, { x: "step", y: "value", z: "unit", stroke: (d) => inks.get(d.unit)!, strokeOpacity: (d) => (!lit || d.unit === lit || curves.length === 1 ? 1 : 0.55), strokeWidth: 1.6 }),
        Plot.line(points.filter((one) => one.unit === lit), { x: "step", y: "value", stroke: "var(--hw-text)", strokeWidth: 3 }),
        Plot.text(apart(named, height), { x: () => held.steps[1], y: "y", text: "unit", textAnchor: "start", dx: 5, fill: "var(--hw-text)", stroke: "var(--hw-panel)", strokeWidth: 3 }),
      ],
    });
    figure.setAttribute("role", "img");
    figure.setAttribute("aria-label", `${label}, against the step of training; ${curves.length} lines, numbers in the table`);
    for (const part of figure.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label");
    box.current!.replaceChildren(figure);
  }, [curves, lit, width, held, night]);
  const nearest = (event: MouseEvent): string => {
    const frame = box.current!.getBoundingClientRect();
    const [first, end] = held.steps;
    const step = first + ((event.clientX - frame.left - side.left) / (width - side.left - side.right)) * (end - first);
    const values = points.map((one) => one.value!);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const value = high - ((event.clientY - frame.top - 20) / (height - 50)) * (high - low);
    const away = (curve: Curve) => {
      const i = curve.steps.reduce((best, at, j) => (Math.abs(at - step) < Math.abs(curve.steps[best]! - step) ? j : best), 0);
      return Math.abs((curve.values[i] ?? Infinity) - value);
    };
    return [...curves].sort((a, b) => away(a) - away(b))[0]?.unit ?? "";
  };
  return <div class="hw-curves" ref={box} onMouseMove={(event) => onOver(nearest(event))} onMouseLeave={() => onOver("")} onClick={(event) => onPick(nearest(event))} />;
}

const layerOf = (unit: string) => Number(/L(\d+)/.exec(unit)?.[1] ?? 0);

/** Later layers are further along the colour map, the last one that has a line at its end. */
function ink(unit: string, curves: Curve[]): string {
  if (curves.length === 1) return "var(--hw-text)";
  const layers = curves.map((curve) => layerOf(curve.unit));
  const low = Math.min(...layers);
  const share = (layerOf(unit) - low) / Math.max(1, Math.max(...layers) - low);
  return `rgb(${sequential(0.35 + 0.65 * share).map(Math.round).join(" ")})`;
}

/** Names at the ends of lines, moved so that none lies on another. */
function apart(curves: Curve[], height: number): { unit: string; y: number }[] {
  const found = curves.map((curve) => ({ unit: curve.unit, y: last(curve) ?? 0 })).sort((a, b) => a.y - b.y);
  const values = curves.flatMap((curve) => curve.values.filter((v): v is number => v !== null));
  const least = ((Math.max(...values) - Math.min(...values)) / height) * 13;
  found.forEach((one, i) => { if (i) one.y = Math.max(one.y, found[i - 1]!.y + least); });
  return found;
}

function Legend({ held, curves }: { held: Training; curves: Curve[] }) {
  return (
    <p class="hw-key">
      {held.held.map((one) => <span>{(one.spans?.length ?? 0) > 0 && <i class="hw-keybox hw-keybox-held" />} {one.text}{one.spans === null ? " (when is not told)" : one.spans.length ? `, steps ${one.spans.map(([a, b]) => `${a} to ${b}`).join(", ")}` : ""}</span>)}
      {marked(curves) && <span><i class="hw-keybox hw-keybox-phase" /> change of phase: half of all change</span>}
    </p>
  );
}

function Table({ state, curves, pick }: { state: State; curves: Curve[]; pick: (unit: string) => void }) {
  const order = [...curves].sort((a, b) => (last(b) ?? -Infinity) - (last(a) ?? -Infinity));
  return (
    <details class="hw-more">
      <summary>All {curves.length} {curves.length === 1 ? "line" : "lines"} as a table</summary>
      <div class="hw-wide" tabIndex={0} role="region" aria-label="Table of training">
        <table class="hw-table">
          <thead><tr><th scope="col">Line</th><th scope="col" class="hw-number">First</th><th scope="col" class="hw-number">Last</th><th scope="col">Change of phase</th></tr></thead>
          <tbody>
            {order.map((curve) => (
              <tr class={curve.unit !== "" && curve.unit === state.unit.value ? "hw-here" : ""}>
                <th scope="row">{state.place.has(curve.unit) ? <button type="button" class="hw-link" onClick={() => pick(curve.unit)}>{curve.unit}</button> : curve.unit || "whole model"}</th>
                <td class="hw-number">{number(curve.values[0] ?? null)}</td>
                <td class="hw-number">{number(last(curve))}</td>
                <td>{curve.phase ? `steps ${curve.phase[0].toLocaleString("en")} to ${curve.phase[1].toLocaleString("en")}` : "none"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}
