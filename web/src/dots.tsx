// A plot of caches: one dot each, quality upwards. Plot draws the axes; the dots are elements that can be focused.
import * as Plot from "@observablehq/plot";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Dot } from "./data";
import { colourOf, dotSentence, KINDS, planOfDot, verdictOf, type Axis } from "./plans";
import type { State } from "./state";

const SHAPES: Record<string, string> = {
  disc: "M0 -5.5A5.5 5.5 0 1 1 0 5.5A5.5 5.5 0 1 1 0 -5.5Z",
  square: "M-4.8 -4.8H4.8V4.8H-4.8Z",
  triangle: "M0 -6L5.8 4.4H-5.8Z",
  diamond: "M0 -6.6L6 0L0 6.6L-6 0Z",
  cross: "M-4.4 -4.4L4.4 4.4M-4.4 4.4L4.4 -4.4",
};

/** The shape says what kind of cache it is; only the rim is drawn for a plan that its trial rejected, or that none accepted. */
export function Mark({ kind, hollow }: { kind: Dot["kind"]; hollow?: boolean }) {
  const colour = colourOf(kind);
  const line = KINDS[kind].glyph === "cross";
  return <path d={SHAPES[KINDS[kind].glyph]} fill={line ? "none" : hollow ? "var(--hw-panel)" : colour} stroke={colour} stroke-width={line ? 2.4 : 2} />;
}

export function KeyMark(props: { kind: Dot["kind"]; hollow?: boolean }) {
  return <svg class="hw-keymark" viewBox="-8 -8 16 16" aria-hidden="true"><Mark {...props} /></svg>;
}

export const isHollow = (state: State, dot: Dot) => dot.kind === "plan" && verdictOf(planOfDot(state, dot)) !== "accepted";

const HEIGHT = 290;
const SIDE = { left: 48, right: 14, top: 26, bottom: 40 };

interface Place { dot: Dot; x: number; y: number }

function domain(values: number[], axis: Axis, room: number): [number, number] {
  const most = Math.max(...values);
  if (axis.least === 0) return [0, axis.field === "decode_ms" || axis.field === "prefill_s" ? most * room || 1 : Math.max(1, most) * room];
  const least = Math.min(...values);
  const rest = (most - least || Math.abs(most) || 1) * 0.15;
  return [least - rest, most + rest];
}

export function Chart({ state, dots, x, y }: { state: State; dots: Dot[]; x: Axis; y: Axis }) {
  const box = useRef<HTMLDivElement>(null);
  const axes = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(380);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.max(240, Math.round(entry!.contentRect.width))));
    watch.observe(box.current!);
    return () => watch.disconnect();
  }, []);
  const value = (dot: Dot, axis: Axis) => dot[axis.field]!;
  const across = domain(dots.map((dot) => value(dot, x)), x, 1.06);
  const up = domain(dots.map((dot) => value(dot, y)), y, 1.04);
  const share = (dot: Dot, axis: Axis, [low, high]: [number, number]) => (value(dot, axis) - low) / (high - low);
  const places = dots.map((dot): Place => {
    const high = share(dot, y, up);
    return {
      dot,
      x: SIDE.left + share(dot, x, across) * (width - SIDE.left - SIDE.right),
      y: SIDE.top + (y.less ? high : 1 - high) * (HEIGHT - SIDE.top - SIDE.bottom),
    };
  });
  useEffect(() => {
    const figure = Plot.plot({
      width,
      height: HEIGHT,
      marginLeft: SIDE.left,
      marginRight: SIDE.right,
      marginTop: SIDE.top,
      marginBottom: SIDE.bottom,
      style: { background: "none", color: "var(--hw-quiet)", fontSize: "11px", fontFamily: "inherit" },
      x: { domain: across, label: `${x.title} \u2192`, ticks: 5, tickFormat: x.show },
      y: { domain: up, reverse: y.less, label: `\u2191 ${y.title}${y.less ? " (less is better)" : ""}`, ticks: 5, tickFormat: y.show, grid: true },
      marks: [Plot.frame({ anchor: "bottom", stroke: "var(--hw-line)" })],
    });
    for (const part of figure.querySelectorAll("g[aria-label]")) part.removeAttribute("aria-label");
    axes.current!.replaceChildren(figure);
  }, [width, x, y, ...across, ...up]);
  return (
    <div class="hw-chart" ref={box}>
      <div ref={axes} aria-hidden="true" />
      <Dots state={state} places={places} width={width} name={`${y.title} against ${x.title}`} />
    </div>
  );
}

function Dots({ state, places, width, name }: { state: State; places: Place[]; width: number; name: string }) {
  const root = useRef<SVGSVGElement>(null);
  const order = [...places].sort((a, b) => a.x - b.x || b.y - a.y);
  const entry = order.find(({ dot }) => dot.key === state.dot.value) ?? order[0];
  const [last, setLast] = useState("");
  const stop = order.some(({ dot }) => dot.key === last) ? last : entry?.dot.key;
  // Dots can lie on one another, as where random heads do as well as the plan: a plan is then found first, and each press goes on.
  const near = (event: MouseEvent): string[] => {
    const frame = root.current!.getBoundingClientRect();
    const reach = (one: Place) => Math.hypot(one.x - event.clientX + frame.left, one.y - event.clientY + frame.top);
    const sorted = [...places].sort((a, b) => reach(a) - reach(b) || plansLast(b, a));
    const best = sorted[0];
    if (!best || reach(best) > 22) return [];
    return sorted.filter((one) => Math.hypot(one.x - best.x, one.y - best.y) < 3).sort((a, b) => plansLast(b, a)).map(({ dot }) => dot.key);
  };
  const press = (event: MouseEvent) => {
    const hits = near(event);
    if (hits.length) state.dot.value = state.over.value = hits[(hits.indexOf(state.dot.value) + 1) % hits.length]!;
  };
  const move = (event: KeyboardEvent) => {
    const now = order.findIndex(({ dot }) => dot.key === (event.target as SVGElement).dataset.dot);
    const to: Record<string, number> = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: order.length - 1 };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      state.dot.value = order[now]!.dot.key;
      if (event.key === "Enter") requestAnimationFrame(() => root.current?.closest(".hw")?.querySelector<HTMLElement>(".hw-numbers h3")?.focus());
    } else if (event.key === "Escape") {
      state.dot.value = "";
    } else if (event.key in to) {
      event.preventDefault();
      const next = order[to[event.key]!];
      if (next) root.current!.querySelector<SVGElement>(`[data-dot="${CSS.escape(next.dot.key)}"]`)?.focus();
    }
  };
  return (
    <svg
      ref={root}
      class="hw-dots"
      width={width}
      height={HEIGHT}
      role="group"
      aria-label={`${name}; ${places.length} dots, arrow keys go from one to the next`}
      onKeyDown={move}
      onMouseMove={(event) => { const hits = near(event); state.over.value = hits.includes(state.dot.value) ? state.dot.value : hits[0] ?? ""; }}
      onMouseLeave={() => { state.over.value = ""; }}
      onClick={press}
    >
      <Labels places={places} width={width} />
      {[...order].sort(plansLast).map(({ dot, x, y }) => (
        <g
          data-dot={dot.key}
          role="button"
          tabIndex={dot.key === stop ? 0 : -1}
          aria-label={dotSentence(state, dot)}
          aria-pressed={dot.key === state.dot.value}
          class={`hw-dot${dot.key === state.over.value ? " hw-over" : ""}`}
          transform={`translate(${x.toFixed(1)} ${y.toFixed(1)})`}
          onFocus={() => { setLast(dot.key); state.over.value = dot.key; }}
          onBlur={() => { state.over.value = ""; }}
        >
          <circle class="hw-halo" r="11" />
          <Mark kind={dot.kind} hollow={isHollow(state, dot)} />
        </g>
      ))}
    </svg>
  );
}

/** Plans are drawn over what lies in the same place. */
const plansLast = (a: Place, b: Place) => Number(a.dot.kind === "plan") - Number(b.dot.kind === "plan");

const LETTER = 5.9;

type Anchor = "start" | "middle" | "end";

/** Where a name may stand beside its dot, best first. */
const SPOTS: [dx: number, dy: number, anchor: Anchor][] = [
  [11, 0, "start"], [-11, 0, "end"], [0, -16, "middle"], [0, 16, "middle"], [9, -13, "start"], [9, 13, "start"], [-9, -13, "end"], [-9, 13, "end"],
];

/** A name beside each dot where there is room for it, plans first; what has no room is named when it is pointed at. */
function Labels({ places, width }: { places: Place[]; width: number }) {
  const taken = places.map(({ x, y }): Box => [x - 8, y - 8, x + 8, y + 8]);
  const several = new Set(places.map(({ dot }) => dot.at)).size > 1;
  const shown: { text: string; x: number; y: number; anchor: Anchor }[] = [];
  const order = [...places].sort((a, b) => plansLast(b, a));
  for (const { dot, x, y } of order) {
    const text = several ? `${dot.short} at ${dot.at.toLocaleString("en")}` : dot.short;
    const wide = text.length * LETTER;
    for (const [dx, dy, anchor] of SPOTS) {
      const left = x + dx - wide * { start: 0, middle: 0.5, end: 1 }[anchor];
      const box: Box = [left, y + dy - 6, left + wide, y + dy + 6];
      const inside = left > SIDE.left && left + wide < width - 2 && box[1] > 2 && box[3] < HEIGHT - SIDE.bottom + 2;
      if (!inside || taken.some((other) => meet(box, other))) continue;
      taken.push(box);
      shown.push({ text, x: x + dx, y: y + dy, anchor });
      break;
    }
  }
  return <g aria-hidden="true" class="hw-dot-names">{shown.map(({ text, x, y, anchor }) => <text x={x.toFixed(1)} y={y.toFixed(1)} dy="0.34em" text-anchor={anchor}>{text}</text>)}</g>;
}

type Box = [left: number, top: number, right: number, bottom: number];
const meet = (a: Box, b: Box) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
