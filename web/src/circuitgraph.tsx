// A graph drawn: tokens at the bottom, a row a layer, the logits on top. Places can be reached by key, edges by pointer.
import { useEffect, useRef, useState } from "preact/hooks";
import { dark, headLook, type Look } from "./colour";
import { keyOf, layout, nodeSentence, TALL, type Layout, type Spot } from "./circuits";
import type { Circuit, CircuitEdge } from "./data";
import type { State } from "./state";

export function CircuitGraph({ state, graph, edges, over, onOver, onPick }: {
  state: State; graph: Circuit; edges: CircuitEdge[]; over: string; onOver: (text: string) => void; onPick: (name: string) => void;
}) {
  const box = useRef<HTMLDivElement>(null);
  const [room, setRoom] = useState(640);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setRoom(Math.max(260, Math.round(entry!.contentRect.width))));
    watch.observe(box.current!);
    return () => watch.disconnect();
  }, []);
  const drawn = layout(graph, edges, room);
  const wide = drawn.width > room;
  return (
    <div class="hw-circuit-frame" ref={box} {...(wide ? { tabIndex: 0, role: "region", "aria-label": "Circuit, wider than its frame" } : {})}>
      <Drawing {...{ state, graph, edges, drawn, over, onOver, onPick }} />
    </div>
  );
}

function Drawing({ state, graph, edges, drawn, over, onOver, onPick }: {
  state: State; graph: Circuit; edges: CircuitEdge[]; drawn: Layout; over: string; onOver: (text: string) => void; onPick: (name: string) => void;
}) {
  const root = useRef<SVGSVGElement>(null);
  const [last, setLast] = useState("");
  const spots = [...drawn.spots.values()];
  const chosen = state.node.value;
  const lit = over || chosen;
  const most = Math.max(...edges.map((edge) => Math.abs(edge.weight ?? 0)), 1e-12);
  const stop = [last, chosen, "logits"].find((name) => drawn.spots.has(name)) ?? spots[0]?.node.name;
  const near = (edge: CircuitEdge) => keyOf(edge) === lit || edge.source === lit || edge.into.includes(lit);
  const some = lit !== "" && edges.some(near);
  const move = (event: KeyboardEvent) => {
    const here = drawn.spots.get((event.target as SVGElement).dataset.place ?? "");
    if (!here) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onPick(here.node.name);
      if (event.key === "Enter") requestAnimationFrame(() => root.current?.closest(".hw")?.querySelector<HTMLElement>(".hw-circuit .hw-numbers h3")?.focus());
    } else if (event.key === "Escape") {
      onPick("");
    } else {
      const next = step(spots, here, event.key);
      if (!next) return;
      event.preventDefault();
      root.current!.querySelector<SVGElement>(`[data-place="${CSS.escape(next.node.name)}"]`)?.focus();
    }
  };
  return (
    <svg
      ref={root}
      class="hw-circuit-graph"
      width={drawn.width}
      height={drawn.height}
      role="group"
      aria-label={`Circuit of ${spots.length} places and ${edges.length} edges; arrow keys go from place to place, the edges stand in the table`}
      onKeyDown={move}
      onMouseLeave={() => onOver("")}
    >
      <g aria-hidden="true">
        {drawn.rows.map((row) => <text class="hw-circuit-row" x="2" y={row.y} dy="0.34em">{row.name}</text>)}
        {[...edges].reverse().map((edge) => edge.into.map((name) => {
          const from = drawn.spots.get(edge.source);
          const to = drawn.spots.get(name);
          if (!from || !to) return null;
          const path = curve(from, to);
          const key = keyOf(edge);
          const share = Math.sqrt(Math.abs(edge.weight ?? 0) / most);
          const against = (edge.weight ?? 0) < 0;
          return (
            <g class={`hw-edge${some ? (near(edge) ? " hw-lit" : " hw-faded") : ""}`} data-edge={key} onMouseEnter={() => onOver(key)} onClick={() => onPick(key)}>
              <path class="hw-edge-reach" d={path} />
              <path d={path} stroke={against ? "var(--hw-failed)" : "var(--hw-accent)"} stroke-width={(0.8 + 5.5 * share).toFixed(2)} stroke-opacity={(0.3 + 0.6 * share).toFixed(2)} stroke-dasharray={against ? "5 3" : undefined} fill="none" />
            </g>
          );
        }))}
      </g>
      {spots.map((spot) => (
        <Place
          key={spot.node.name}
          {...{ state, spot }}
          says={nodeSentence(state, graph, spot.node, edges)}
          stop={spot.node.name === stop}
          pressed={spot.node.name === chosen}
          onPick={() => onPick(spot.node.name)}
          onOver={(on) => onOver(on ? spot.node.name : "")}
          onFocus={() => { setLast(spot.node.name); onOver(spot.node.name); }}
        />
      ))}
    </svg>
  );
}

function Place({ state, spot, says, stop, pressed, onPick, onOver, onFocus }: {
  state: State; spot: Spot; says: string; stop: boolean; pressed: boolean; onPick: () => void; onOver: (on: boolean) => void; onFocus: () => void;
}) {
  const { node, x, y, wide, text } = spot;
  const look = lookOf(state, spot);
  return (
    <g
      data-place={node.name}
      role="button"
      tabIndex={stop ? 0 : -1}
      aria-label={says}
      aria-pressed={pressed}
      class={`hw-place hw-place-${node.kind}`}
      transform={`translate(${x.toFixed(1)} ${y})`}
      onClick={onPick}
      onMouseEnter={() => onOver(true)}
      onMouseLeave={() => onOver(false)}
      onFocus={onFocus}
      onBlur={() => onOver(false)}
    >
      <rect class="hw-place-ring" x={-wide / 2 - 3} y={-TALL / 2 - 3} width={wide + 6} height={TALL + 6} rx="7" />
      <rect x={-wide / 2} y={-TALL / 2} width={wide} height={TALL} rx="5" style={look ? { fill: look.fill, stroke: look.edge } : undefined} />
      <text dy="0.34em" text-anchor="middle" style={look ? { fill: look.ink } : undefined}>{text}</text>
    </g>
  );
}

/** A head that has a role stands in its colour of the map. */
function lookOf(state: State, spot: Spot): Look | undefined {
  dark.value;
  const head = state.data.heads[state.place.get(spot.node.name) ?? -1];
  return head && head.role !== "unknown" && head.verdict !== "refuted" ? headLook(head) : undefined;
}

function curve(from: Spot, to: Spot): string {
  const low = from.y - TALL / 2;
  const high = to.y + TALL / 2;
  // In one row, as from a head to the MLP behind it, the line goes round below.
  if (low <= high) {
    const dip = from.y + TALL / 2 + 14;
    return `M${from.x.toFixed(1)} ${from.y + TALL / 2}C${from.x.toFixed(1)} ${dip} ${to.x.toFixed(1)} ${dip} ${to.x.toFixed(1)} ${to.y + TALL / 2}`;
  }
  const bend = (low - high) * 0.45;
  return `M${from.x.toFixed(1)} ${low}C${from.x.toFixed(1)} ${(low - bend).toFixed(1)} ${to.x.toFixed(1)} ${(high + bend).toFixed(1)} ${to.x.toFixed(1)} ${high}`;
}

/** The place that an arrow key leads to: beside in the row, or the nearest one in the row above or below. */
function step(spots: Spot[], here: Spot, key: string): Spot | undefined {
  const row = spots.filter((one) => one.y === here.y).sort((a, b) => a.x - b.x);
  const at = row.indexOf(here);
  if (key === "ArrowRight") return row[at + 1];
  if (key === "ArrowLeft") return row[at - 1];
  if (key === "Home") return row[0];
  if (key === "End") return row.at(-1);
  if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
  const way = key === "ArrowUp" ? -1 : 1;
  const beyond = spots.filter((one) => (one.y - here.y) * way > 0);
  const nearest = Math.min(...beyond.map((one) => Math.abs(one.y - here.y)));
  return beyond.filter((one) => Math.abs(one.y - here.y) === nearest).sort((a, b) => Math.abs(a.x - here.x) - Math.abs(b.x - here.x))[0];
}
