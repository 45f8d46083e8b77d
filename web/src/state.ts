// The state of one view: a signal for each thing the reader can choose, kept equal to the host's model.
import { effect, signal, type Signal } from "@preact/signals";
import { ROLES } from "./colour";
import type { Data, Head, Model, Prompt, Score, Training } from "./data";
import { QUALITIES } from "./plans";

export interface State {
  data: Data;
  unit: Signal<string>;
  colour: Signal<string>;
  prompt: Signal<string>;
  side: Signal<string>;
  token: Signal<number>;
  view: Signal<string>;
  role: Signal<string>;
  dot: Signal<string>;
  quality: Signal<string>;
  graph: Signal<string>;
  edges: Signal<number>;
  node: Signal<string>;
  curve: Signal<string>;
  training: Signal<Training | null>;
  hover: Signal<string>;
  over: Signal<string>;
  source: Signal<string>;
  place: Map<string, number>;
  stop: () => void;
}

const SHARED = ["unit", "colour", "prompt", "side", "token", "view", "role", "dot", "quality", "graph", "edges", "node", "curve"] as const;

/** A proved head where there is one, in the order of roles. */
export function firstHead(data: Data): string {
  const order = (head: Head) => (head.verdict === "proved" ? 0 : head.role !== "unknown" ? 100 : 200) + ROLES.indexOf(head.role);
  return [...data.heads].sort((a, b) => order(a) - order(b))[0]?.unit ?? "";
}

export function createState(model: Model): State {
  const data = model.get("data") as Data;
  const place = new Map(data.heads.map((head, i) => [head.unit, i]));
  const fallback: Record<(typeof SHARED)[number], string | number> = {
    unit: firstHead(data),
    colour: data.heads.some((head) => head.role !== "unknown") ? "roles" : data.scores[0]?.name ?? "roles",
    prompt: data.patterns[0]?.id ?? "",
    side: "query",
    token: -1,
    view: "grid",
    role: "",
    dot: "",
    quality: "kept",
    graph: "",
    edges: 0,
    node: "",
    curve: "",
  };
  const valid: Partial<Record<string, (value: any) => boolean>> = {
    unit: (value) => place.has(value),
    colour: (value) => value === "roles" || data.scores.some((score) => score.name === value),
    prompt: (value) => data.patterns.some((prompt) => prompt.id === value),
    side: (value) => value === "query" || value === "key",
    view: (value) => value === "grid" || value === "table",
    dot: (value) => data.tradeoffs?.dots.some((one) => one.key === value) ?? false,
    quality: (value) => value in QUALITIES,
    graph: (value) => data.circuits?.graphs.some((one) => one.name === value) ?? false,
    edges: (value) => Number.isInteger(value) && value >= 0,
  };
  const read = (key: (typeof SHARED)[number]) => {
    const value = model.get(key);
    const given = value !== undefined && value !== null && value !== "" && (valid[key]?.(value) ?? true);
    return given ? value : fallback[key];
  };
  const signals = Object.fromEntries(SHARED.map((key) => [key, signal(read(key))]));
  const stops: (() => void)[] = [];
  for (const key of SHARED) {
    const pull = () => { signals[key]!.value = read(key); };
    model.on(`change:${key}`, pull);
    stops.push(() => model.off(`change:${key}`, pull));
    stops.push(effect(() => {
      const value = signals[key]!.value;
      if (model.get(key) !== value) { model.set(key, value); model.save_changes(); }
    }));
  }
  // Training goes on: what is measured meanwhile comes as new data of the same heads.
  const training = signal(data.training);
  const renew = () => { training.value = (model.get("data") as Data).training; };
  model.on("change:data", renew);
  stops.push(() => model.off("change:data", renew));
  return { data, place, training, hover: signal(""), over: signal(""), source: signal(""), stop: () => stops.forEach((stop) => stop()), ...signals } as unknown as State;
}

export const headOf = (state: State, unit: string): Head | undefined => state.data.heads[state.place.get(unit) ?? -1];
export const scoreOf = (state: State, name: string): Score | undefined => state.data.scores.find((score) => score.name === name);
export const promptOf = (state: State): Prompt | undefined => state.data.patterns.find((prompt) => prompt.id === state.prompt.value);

/** Place in a score, heads that have the same value, heads that have one, and the share of them that stand no higher. */
export interface Rank { rank: number; equal: number; of: number; share: number }

const ranks = new WeakMap<Score, (Rank | undefined)[]>();

/** Where a head stands in a score: 1 is the highest value; heads without a value have no rank. */
export function rankOf(score: Score, i: number): Rank | undefined {
  let found = ranks.get(score);
  if (!found) {
    const order = score.value.map((value, at) => ({ value, at })).filter((one) => one.value !== null);
    order.sort((a, b) => b.value! - a.value!);
    found = score.value.map(() => undefined);
    for (let first = 0, next = 0; first < order.length; first = next) {
      while (next < order.length && order[next]!.value === order[first]!.value) next++;
      const middle = (first + next - 1) / 2;
      const rank = { rank: first + 1, equal: next - first, of: order.length, share: order.length > 1 ? 1 - middle / (order.length - 1) : 1 };
      for (const one of order.slice(first, next)) found[one.at] = rank;
    }
    ranks.set(score, found);
  }
  return found[i];
}

export const rankText = (rank: Rank | undefined) => (rank ? `${rank.rank}${rank.equal > 1 ? " =" : ""}` : "-");
