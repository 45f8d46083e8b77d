// Graphs in words and places: which edges are shown, where their ends stand, what is said of them, and the Python for it.
import type { Circuit, CircuitEdge, CircuitNode } from "./data";
import type { State } from "./state";
import { number, percent, visible } from "./words";

export const FEW = 40;

export const graphOf = (state: State): Circuit | undefined => {
  const graphs = state.data.circuits?.graphs ?? [];
  return graphs.find((one) => one.name === state.graph.value) ?? graphs[0];
};

/** How many edges are shown: as many as were asked for, or as many as can be read. */
export const countOf = (state: State, graph: Circuit) =>
  Math.min(graph.edges.length, state.edges.value > 0 ? state.edges.value : FEW);

export const keyOf = (edge: CircuitEdge) => `${edge.source}>${edge.target}`;
export const edgeOf = (graph: Circuit, key: string) => graph.edges.find((edge) => keyOf(edge) === key);
export const nodeOf = (graph: Circuit, name: string) => graph.nodes.find((node) => node.name === name);

/** The difference between the two runs that shares are shares of; none for graphs of whole tasks. */
export const gapOf = (graph: Circuit) => (graph.question ? graph.question.clean - graph.question.corrupt : null);

export function amount(graph: Circuit, weight: number | null): string {
  const gap = gapOf(graph);
  if (weight === null) return "-";
  if (!gap) return number(weight);
  const share = (100 * weight) / gap;
  const text = Math.abs(share) >= 10 ? Math.round(share) : Number(share.toFixed(1));
  return `${share > 0 ? "+" : ""}${text} %`.replace("-", "\u2212");
}

/** A place as a reader of the prompt knows it: `" Mary", token 2`. */
export function placeName(graph: Circuit, name: string): string {
  const column = /^embed@(\d+)$/.exec(name)?.[1];
  if (column === undefined) return name === "embed" ? "all tokens" : name;
  const token = graph.tokens[Number(column)];
  return token === undefined ? `column ${column} (answer)` : `${visible(token)}@${column}`;
}

const SIDES: Record<string, string> = { q: "query", k: "key", v: "value" };

/** "the query of L5.H1", "the keys of L5.G0 (L5.H0, L5.H1)". */
export function targetName(edge: CircuitEdge): string {
  const side = SIDES[edge.target.split(".")[2] ?? ""];
  if (!side) return edge.target;
  const unit = edge.target.split(".").slice(0, 2).join(".");
  return unit.includes(".G") ? `the ${side}s of ${unit} (${edge.into.join(", ")})` : `the ${side} of ${unit}`;
}

export function edgeSentence(graph: Circuit, edge: CircuitEdge): string {
  const gap = gapOf(graph);
  const what = gap ? `${amount(graph, edge.weight)} of the difference, ${number(edge.weight)}` : number(edge.weight);
  return `${placeName(graph, edge.source)} to ${targetName(edge)}: ${what}`;
}

export function nodeSentence(state: State, graph: Circuit, node: CircuitNode, shown: CircuitEdge[]): string {
  const reads = shown.filter((edge) => edge.into.includes(node.name)).length;
  const writes = shown.filter((edge) => edge.source === node.name).length;
  const loss = graph.question?.losses[node.name];
  const role = state.data.heads[state.place.get(node.name) ?? -1]?.role;
  const parts = [
    role && role !== "unknown" ? role : "",
    node.kind === "token" ? "" : `reads ${reads}`,
    node.kind === "logits" ? "" : `is read ${writes === 1 ? "once" : `${writes} times`}`,
    loss === undefined ? "" : `without it the graph loses ${percent(loss)}`,
  ];
  return `${node.kind === "token" ? placeName(graph, node.name) : node.name}: ${parts.filter(Boolean).join(", ")}`;
}

// Where things stand

export interface Spot { node: CircuitNode; x: number; y: number; wide: number; text: string }
export interface Row { name: string; y: number }
export interface Layout { spots: Map<string, Spot>; rows: Row[]; width: number; height: number }

export const TALL = 20;
const LEFT = 40;
const SIDE = 6;
const AIR = 7;

const textOf = (node: CircuitNode) => {
  const text = node.kind === "token" ? visible(node.label) : node.label;
  // No ellipsis: what is seen must stand in what is read out.
  return text.slice(0, 11);
};

/** Tokens below, logits above, a row for every layer that has a place; in a row, each near what it reads. */
export function layout(graph: Circuit, edges: CircuitEdge[], room: number): Layout {
  const used = new Set(edges.flatMap((edge) => [edge.source, ...edge.into]));
  const nodes = graph.nodes.filter((node) => used.has(node.name));
  const levels = [...new Set(nodes.map(levelOf))].sort((a, b) => a - b);
  const step = Math.max(34, Math.min(58, 620 / Math.max(levels.length, 1)));
  const height = Math.round((levels.length - 1) * step + TALL + 24);
  const spots = new Map<string, Spot>();
  let width = room;
  const rows = levels.map((level, i): Row => {
    const y = Math.round(height - 12 - TALL / 2 - i * step);
    const here = nodes.filter((node) => levelOf(node) === level).sort((a, b) => a.order - b.order);
    const row = here.map((node, at): Spot => {
      const text = textOf(node);
      const wide = Math.max(34, Math.round(text.length * 6.7 + 12));
      return { node, x: wishOf(node, at, here.length, edges, spots, room), y, wide, text };
    });
    // Tokens keep the order of the prompt.
    if (level >= 0) row.sort((a, b) => a.x - b.x);
    width = Math.max(width, spread(row, room));
    for (const spot of row) spots.set(spot.node.name, spot);
    return { name: level < 0 ? "" : level === Infinity ? "" : `L${level}`, y };
  });
  return { spots, rows, width, height };
}

const levelOf = (node: CircuitNode) => (node.kind === "token" ? -1 : node.kind === "logits" ? Infinity : node.layer!);

function wishOf(node: CircuitNode, at: number, many: number, edges: CircuitEdge[], spots: Map<string, Spot>, room: number): number {
  const even = LEFT + ((at + 0.5) / many) * (room - LEFT);
  if (node.kind === "token") return even;
  let sum = 0;
  let total = 0;
  for (const edge of edges) {
    const from = spots.get(edge.source);
    if (!from || !edge.into.includes(node.name)) continue;
    const size = Math.abs(edge.weight ?? 0);
    sum += size * from.x;
    total += size;
  }
  return total ? sum / total : even;
}

/** Move the places of a row apart, as little as is needed; hands back the width that the row takes. */
function spread(row: Spot[], room: number): number {
  let edge = LEFT;
  for (const spot of row) {
    spot.x = Math.max(spot.x, edge + spot.wide / 2);
    edge = spot.x + spot.wide / 2 + AIR;
  }
  let right = Math.max(room - SIDE, edge - AIR);
  const need = LEFT + row.reduce((sum, spot) => sum + spot.wide + AIR, 0);
  if (need <= room) right = room - SIDE;
  for (const spot of [...row].reverse()) {
    spot.x = Math.min(spot.x, right - spot.wide / 2);
    right = spot.x - spot.wide / 2 - AIR;
  }
  return Math.max(room, need);
}

// The Python that gives the same numbers

const quoted = (text: string) => JSON.stringify(text);
const pair = (edge: CircuitEdge) => `${quoted(edge.source)}, ${quoted(edge.target)}`;
const plain = (value: number | null) => (value === null ? "nan" : String(value));

/** The graph as it is shown, and the numbers of what is selected. */
export function codeFor(graph: Circuit, count: number, chosen: string): string {
  const lines = [graph.code];
  if (count < graph.edges_in_all) lines.push(`shown = graph.top(${count})`);
  const edge = edgeOf(graph, chosen);
  const node = nodeOf(graph, chosen);
  if (edge) {
    lines.push(`print(graph[${pair(edge)}])  # ${plain(edge.weight)}`);
    if (graph.exact) lines.push("", ...exactFor(graph, edge));
  } else if (node) {
    const loss = graph.question?.losses[node.name];
    if (loss !== undefined) lines.push(`print(worth.losses[${quoted(node.name)}])  # ${plain(loss)}`);
    if (node.kind !== "logits") lines.push(`print(graph.only(lambda edge: edge[0] == ${quoted(node.name)}).table)`);
    if (node.kind !== "token") lines.push(`print(graph.only(lambda edge: ${quoted(node.name)} in graph.nodes_of(edge[1])).table)`);
  } else if (graph.question) {
    lines.push(...measured(graph));
  } else {
    lines.push("print(graph.table)");
  }
  return lines.join("\n");
}

function measured(graph: Circuit): string[] {
  const asked = graph.question!;
  return [
    `print(worth.clean, worth.corrupt)  # ${plain(asked.clean)} ${plain(asked.corrupt)}`,
    `print(worth.faithfulness, worth.left)  # ${plain(asked.faithfulness)} ${plain(asked.left)}`,
    `print(worth.p)  # ${JSON.stringify(asked.p)}`,
    "print(worth.sentence())",
  ];
}

const exactFor = (graph: Circuit, edge: CircuitEdge) =>
  graph.exact.replaceAll("SOURCE", () => quoted(edge.source)).replaceAll("TARGET", () => quoted(edge.target)).split("\n");

/** Every number that the view shows, each with the expression that gives it. */
export function workbench(graph: Circuit, count: number): string {
  const lines = [graph.code, ""];
  if (graph.question) {
    lines.push(...measured(graph), "");
    for (const [name, loss] of Object.entries(graph.question.losses)) lines.push(`print(worth.losses[${quoted(name)}])  # ${plain(loss)}`);
    lines.push("");
  }
  for (const edge of graph.edges.slice(0, count)) lines.push(`print(graph[${pair(edge)}])  # ${plain(edge.weight)}`);
  return lines.join("\n");
}
