// Stored patterns: bytes per layer, deflated; opened when a head is looked at, then kept.
import type { Prompt } from "./data";

export interface Pattern {
  tokens: string[];
  queries: number;
  keys: number;
  /** Weight from a query to a key, 0 to 1. */
  at: (query: number, key: number) => number;
}

const opened = new WeakMap<Prompt, Map<string, Promise<Uint8Array>>>();

async function inflate(text: string): Promise<Uint8Array> {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The pattern of one head ("L5", 1) on a prompt, or undefined where that layer was not stored. */
export async function patternOf(prompt: Prompt, layer: string, head: number): Promise<Pattern | undefined> {
  const entry = prompt.layers[layer];
  if (!entry || head >= entry.shape[0]) return undefined;
  const kept = opened.get(prompt) ?? new Map<string, Promise<Uint8Array>>();
  opened.set(prompt, kept);
  if (!kept.has(layer)) kept.set(layer, inflate(entry.data));
  const all = await kept.get(layer)!;
  const [, queries, keys] = entry.shape;
  const start = head * queries * keys;
  return { tokens: prompt.tokens, queries, keys, at: (query, key) => (all[start + query * keys + key] ?? 0) / 255 };
}

export interface Link { query: number; key: number; weight: number }

/** The strongest links, at most one for each pair of tokens; a first token that can only see itself says nothing. */
export function strongest(pattern: Pattern, count: number): Link[] {
  const links: Link[] = [];
  for (let query = 0; query < pattern.queries; query++) {
    for (let key = 0; key < pattern.keys; key++) {
      const weight = pattern.at(query, key);
      if (weight >= 0.05 && !(query === 0 && key === 0)) links.push({ query, key, weight });
    }
  }
  links.sort((a, b) => b.weight - a.weight || b.query - a.query);
  const seen = new Set<string>();
  return links.filter(({ query, key }) => {
    const pair = `${pattern.tokens[query]}\u0000${pattern.tokens[key]}`;
    return !seen.has(pair) && seen.add(pair);
  }).slice(0, count);
}

/** The link, neither to the token itself nor to the first token, that is furthest above an even share of what came before. */
export function telling(pattern: Pattern): { query: number; weight: number } {
  let best = { query: pattern.queries - 1, weight: 0 };
  let excess = 0;
  for (let query = 1; query < pattern.queries; query++) {
    for (let key = 1; key < pattern.keys; key++) {
      const weight = pattern.at(query, key);
      if (key === query || weight - 1 / (query + 1) < excess) continue;
      excess = weight - 1 / (query + 1);
      best = { query, weight };
    }
  }
  return best;
}

/** The token to show first: where the head does something, else the last one. */
export function opening(pattern: Pattern): number {
  const { query, weight } = telling(pattern);
  return weight >= 0.1 ? query : pattern.queries - 1;
}
