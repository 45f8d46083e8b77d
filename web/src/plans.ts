// Plans and the caches that were tried, in words: what a dot says, and what a plan does with each head.
import palette from "../../headwise/view/palette.json";
import type { Dot, Plan } from "./data";
import type { State } from "./state";
import { number, percent } from "./words";

type Field = "bytes" | "share" | "kept" | "retrieval" | "nll" | "prefill_s" | "decode_ms" | "peak_mb";

/** What can stand on an axis. `least`: the value at which the axis starts, or "near" for just under the smallest one. */
export interface Axis { field: Field; title: string; less: boolean; show: (value: number) => string; least: 0 | "near" }

export const QUALITIES: Record<string, Axis> = {
  kept: { field: "kept", title: "answers kept", less: false, show: percent, least: 0 },
  retrieval: { field: "retrieval", title: "answers right", less: false, show: percent, least: 0 },
  nll: { field: "nll", title: "held-out text, nats a token", less: true, show: number, least: "near" },
};

export const BYTES: Axis = { field: "share", title: "bytes, of the full cache's", less: true, show: percent, least: 0 };
export const TIMES: Record<string, Axis> = {
  decode_ms: { field: "decode_ms", title: "ms a new token", less: true, show: number, least: 0 },
  prefill_s: { field: "prefill_s", title: "seconds to read the prompt", less: true, show: number, least: 0 },
};

export const KINDS = palette.caches;
export const colourOf = (kind: Dot["kind"]) => `var(--hw-${KINDS[kind].colour})`;

const dotOf = (state: State, key: string) => state.data.tradeoffs?.dots.find((dot) => dot.key === key);
const planOf = (state: State, name: string) => state.data.tradeoffs?.plans.find((plan) => plan.name === name);

/** The dot that is pointed at, else the selected one. */
export const shownDot = (state: State): Dot | undefined => dotOf(state, state.over.value) ?? dotOf(state, state.dot.value);
export const selectedDot = (state: State): Dot | undefined => dotOf(state, state.dot.value);

/** The plan that the map shows: that of the dot, where the dot is a plan's own. Which heads a random draw took is not kept. */
export function shownPlan(state: State): Plan | undefined {
  const dot = shownDot(state);
  return dot?.kind === "plan" ? planOf(state, dot.plan) : undefined;
}

export const planOfDot = (state: State, dot: Dot): Plan | undefined => planOf(state, dot.plan);

/** What a plan does with the KV head that a head reads from. Layers whose cache has no choice have none. */
export interface Treatment { kv: string; name: string; text: string; all: boolean }

export function treatmentOf(state: State, plan: Plan, unit: string): Treatment | undefined {
  const kv = state.data.tradeoffs?.kv[state.place.get(unit) ?? -1] ?? "";
  const name = plan.heads[kv];
  const entry = name === undefined ? undefined : plan.legend[name];
  return name === undefined || !entry ? undefined : { kv, name, ...entry };
}

/** "27 of 90 KV heads full", and what the others get. */
export function treatments(plan: Plan): { text: string; count: number; all: boolean }[] {
  const names = Object.values(plan.heads);
  return Object.entries(plan.legend)
    .map(([name, entry]) => ({ ...entry, count: names.filter((one) => one === name).length }))
    .filter((one) => one.count > 0)
    .sort((a, b) => Number(b.all) - Number(a.all));
}

export function planSentence(plan: Plan): string {
  const total = Object.keys(plan.heads).length;
  const parts = treatments(plan).map((one) => `${one.count} ${one.all ? "full (ringed)" : `by ${one.text} (faded)`}`);
  return `Shown: plan ${plan.name}. Of ${total} KV heads ${parts.join("; ")}.`;
}

export const verdictOf = (plan: Plan | undefined) =>
  !plan || plan.accepted === null ? "" : plan.accepted ? "accepted" : "rejected";

export const tokens = (at: number) => `${at.toLocaleString("en")} tokens`;

export function size(bytes: number | null): string {
  if (bytes === null) return "-";
  const unit = ["B", "kB", "MB", "GB"];
  let step = 0;
  for (; bytes >= 1000 && step < 3; step++) bytes /= 1000;
  return `${number(step ? bytes : Math.round(bytes))} ${unit[step]}`;
}

export const nameOf = (state: State, dot: Dot) => {
  const verdict = dot.kind === "plan" ? verdictOf(planOfDot(state, dot)) : "";
  return verdict ? `${dot.name}, ${verdict}` : dot.name;
};

/** All of a dot in a line, as it is read out. */
export function dotSentence(state: State, dot: Dot): string {
  const parts = [
    dot.kept !== null && `${percent(dot.kept)} of the answers kept`,
    dot.retrieval !== null && `${percent(dot.retrieval)} right`,
    dot.nll !== null && `${number(dot.nll)} nats a token`,
    dot.share !== null && `${percent(dot.share)} of the bytes`,
    dot.decode_ms !== null && `${number(dot.decode_ms)} ms a token`,
    `at ${tokens(dot.at)}`,
  ];
  return `${nameOf(state, dot)}: ${parts.filter(Boolean).join(", ")}`;
}
