// How a score is spread over all heads, with the selected head marked.
import * as Plot from "@observablehq/plot";
import { useEffect, useRef, useState } from "preact/hooks";
import { scoreOf, type State } from "./state";
import { number, title } from "./words";

export function Spread({ state }: { state: State }) {
  const box = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(640);
  const score = scoreOf(state, state.colour.value);
  const unit = state.unit.value;
  useEffect(() => {
    if (!box.current) return;
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(240, Math.round(entry!.contentRect.width))));
    watch.observe(box.current);
    return () => watch.disconnect();
  }, [score !== undefined]);
  useEffect(() => {
    if (!box.current || !score) return;
    const here = score.value[state.place.get(unit) ?? -1];
    const values = score.value.flatMap((value, i) => (value === null ? [] : [{ value, proved: state.data.heads[i]!.verdict === "proved" }]));
    const shown = values.map((one) => one.value);
    const part = here === null || here === undefined ? 0 : (here - Math.min(...shown)) / (Math.max(...shown) - Math.min(...shown) || 1);
    const figure = Plot.plot({
      width,
      height: 132,
      marginLeft: 34,
      marginBottom: 34,
      marginTop: 18,
      style: { background: "none", color: "var(--hw-quiet)", fontSize: "11px", fontFamily: "inherit" },
      x: { label: `${title(score.name)} \u2192`, nice: true },
      y: { label: null, type: "sqrt", ticks: 3, tickFormat: "d" },
      marks: [
        Plot.rectY(values, { ...Plot.binX({ y: "count" }, { x: "value", thresholds: 60 }), fill: "var(--hw-quiet)", fillOpacity: 0.55, inset: 0.5 }),
        Plot.tickX(values.filter((one) => one.proved), { x: "value", y: undefined, stroke: "var(--hw-accent)", strokeWidth: 1.5, insetTop: 72 }),
        Plot.ruleY([0], { stroke: "var(--hw-line)" }),
        ...(here === null || here === undefined ? [] : [
          Plot.ruleX([here], { stroke: "var(--hw-text)", strokeWidth: 1.5 }),
          Plot.text([here], { x: (value: number) => value, frameAnchor: "top", dy: -14, textAnchor: part > 0.85 ? "end" : part < 0.15 ? "start" : "middle", text: () => `${unit} ${number(here)}`, fill: "var(--hw-text)", fontWeight: 600, fontSize: 12 }),
        ]),
      ],
    });
    figure.setAttribute("role", "img");
    figure.setAttribute("aria-label", `Spread of ${title(score.name)} over ${values.length} heads; ${unit} has ${number(here)}`);
    for (const part of figure.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label");
    box.current.replaceChildren(figure);
  }, [score, unit, width]);
  if (!score) return null;
  return (
    <section class="hw-panel hw-spread" aria-label="Spread of the score">
      <div class="hw-bar"><h2>Spread</h2><span class="hw-quiet hw-small">number of heads on a root scale; blue ticks are proved heads</span></div>
      <div ref={box} />
    </section>
  );
}
