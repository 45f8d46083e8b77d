// What headwise/view/gather.py hands over, and the `model` through which every host gives it.

export interface Head {
  unit: string;
  stack: string;
  layer: number;
  index: number;
  role: string;
  verdict: "proved" | "refuted" | "unknown";
  sentence: string;
}

type Column = (number | null)[];

export interface Score {
  name: string;
  kind: "head" | "kv";
  evidence: string;
  about: Record<string, unknown>;
  code: string;
  value: Column;
  low: Column;
  high: Column;
  n: Column;
}

export interface Rung {
  step: string;
  score: string;
  value: number | null;
  low: number | null;
  high: number | null;
  null: number | null;
  p: number | null;
  p_holm: number | null;
  n: number | null;
  share: number | null;
  passed: boolean;
}

export interface Claim {
  role: string;
  verdict: Head["verdict"];
  rungs: Rung[];
}

export interface Prompt {
  id: string;
  tokens: string[];
  text: string;
  layers: Record<string, { shape: [number, number, number]; data: string }>;
}

export type Readout = [source: string, target: string, value: number | null];

export interface Stack {
  name: string;
  title: string;
  layers: number[];
  width: number;
}

export interface Plan {
  name: string;
  accepted: boolean | null;
  says: string;
  rule: string;
  legend: Record<string, { text: string; all: boolean }>;
  heads: Record<string, string>;
  scores: Record<string, Record<string, number | null>>;
  about: Record<string, unknown>;
}

/** One cache that was tried: on a plan's trial, or by `headwise bench`. */
export interface Dot {
  key: string;
  name: string;
  short: string;
  kind: "plan" | "random" | "streaming" | "full" | "other";
  plan: string;
  at: number;
  accuracy: Record<string, number | null>;
  n: Record<string, number>;
  bytes: number | null;
  share: number | null;
  kept: number | null;
  retrieval: number | null;
  nll: number | null;
  prefill_s: number | null;
  decode_ms: number | null;
  peak_mb: number | null;
}

/** `kv` names for every head the KV head that it reads from. */
export interface Tradeoffs {
  kv: string[];
  plans: Plan[];
  dots: Dot[];
  left_out: Record<string, string>;
}

/** A place of a graph: tokens (and "embed") write only, the logits read only. */
export interface CircuitNode {
  name: string;
  kind: "token" | "head" | "mlp" | "logits";
  layer: number | null;
  label: string;
  order: number;
}

/** An edge; `into` names the drawn places that its target belongs to. */
export interface CircuitEdge {
  source: string;
  target: string;
  weight: number | null;
  error: number | null;
  into: string[];
}

/** What `headwise why` was asked, and what it measured of its graph. */
export interface Question {
  /** Of one prompt. */
  prompt?: string;
  answer?: string;
  instead?: string;
  contrast?: string[];
  how?: string;
  /** Of a whole task: its name, how many prompts chose the graph and how many measured it. */
  task?: string;
  prompts?: [number, number];
  chosen?: number;
  metric: string;
  clean: number;
  corrupt: number;
  faithfulness: number;
  low: number | null;
  high: number | null;
  left: number;
  explains: boolean;
  says: string;
  p: Record<string, number>;
  losses: Record<string, number>;
  of: number;
  unseen?: { prompts: string; faithfulness: number } | null;
}

export interface Circuit {
  name: string;
  title: string;
  evidence: string;
  edges_in_all: number;
  question: Question | null;
  tokens: string[];
  nodes: CircuitNode[];
  edges: CircuitEdge[];
  about: Record<string, unknown>;
  code: string;
  exact: string;
}

export interface Circuits {
  graphs: Circuit[];
  left_out: Record<string, string>;
}

/** One number over training; `phase` is the short stretch of steps in which most of its change happens. */
export interface Curve {
  metric: string;
  split: string;
  unit: string;
  steps: number[];
  values: Column;
  phase: [number, number] | null;
}

/** What was held, reset or taught otherwise; `spans` is null where run.json cannot tell when. */
export interface Held { text: string; spans: [number, number][] | null }

export interface Training {
  name: string;
  steps: [number, number];
  curves: Curve[];
  held: Held[];
  code: string;
  call: string;
}

export interface Data {
  format: number;
  about: Record<string, unknown>;
  atlas: string;
  summary: string;
  does: Record<string, string>;
  stacks: Stack[];
  heads: Head[];
  scores: Score[];
  tests: Record<string, Record<string, unknown>>;
  claims: Record<string, Claim[]>;
  patterns: Prompt[];
  readouts: Record<string, Record<string, Readout[]>>;
  tradeoffs: Tradeoffs | null;
  circuits: Circuits | null;
  training: Training | null;
  /** Of the page of an experiment that is being trained: its runs, and the folders in which they write. */
  live?: { runs: { name: string; place: string }[] };
}

/** anywidget's front-end model: the only thing a view is given beside its element. */
export interface Model {
  get(key: string): any;
  set(key: string, value: unknown): void;
  save_changes(): void;
  on(event: string, callback: () => void): void;
  off(event: string, callback: () => void): void;
}

export const LADDER = ["seen", "read", "needed", "enough", "mediated", "grown"];
