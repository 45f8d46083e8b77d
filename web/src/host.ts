// The page as a host: a `model` over the JSON block of the file, whose state lives in the address after the #.
// "#L5.H1" is a link to a head; "#L5.H1&colour=induction&view=table" is one with the rest of the state.
import type { Model } from "./data";

const PLAIN: Record<string, unknown> = { colour: "roles", side: "query", token: -1, view: "grid", role: "", dot: "", quality: "kept", graph: "", edges: 0, node: "", curve: "", run: "" };

export function readHash(hash: string): Record<string, unknown> {
  const [unit, ...rest] = hash.replace(/^#/, "").split("&");
  const state: Record<string, unknown> = {};
  if (unit) state.unit = decode(unit);
  for (const pair of rest) {
    const cut = pair.indexOf("=");
    if (cut < 1) continue;
    const key = pair.slice(0, cut);
    const value = decode(pair.slice(cut + 1));
    if (key === "token") state.token = Number.isInteger(Number(value)) ? Number(value) : -1;
    else if (key === "edges") state.edges = Number.isInteger(Number(value)) ? Number(value) : 0;
    else if (key in PLAIN || key === "prompt") state[key] = value;
  }
  return state;
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export function writeHash(state: Record<string, unknown>, firstPrompt: string): string {
  const parts = Object.entries({ ...PLAIN, prompt: firstPrompt })
    .filter(([key, plain]) => state[key] !== undefined && state[key] !== plain)
    .map(([key]) => `${key}=${encodeURIComponent(String(state[key]))}`);
  return "#" + [encodeURIComponent(String(state.unit ?? "")), ...parts].join("&");
}

/** The model of the page; `put` is how the page itself brings something new. */
export function pageModel(data: any): Model & { put: (key: string, value: unknown) => void } {
  const state: Record<string, unknown> = { ...PLAIN, colour: undefined, ...readHash(location.hash), data };
  const heard = new Map<string, Set<() => void>>();
  const firstPrompt = data.patterns[0]?.id ?? "";
  const put = (key: string, value: unknown) => {
    state[key] = value;
    heard.get(`change:${key}`)?.forEach((callback) => callback());
  };
  addEventListener("hashchange", () => {
    const read = readHash(location.hash);
    for (const [key, value] of Object.entries(read)) {
      if (state[key] === value) continue;
      put(key, value);
    }
    history.replaceState(null, "", writeHash(state, firstPrompt));
  });
  return {
    put,
    get: (key) => state[key],
    set: (key, value) => { state[key] = value; },
    save_changes: () => history.replaceState(null, "", writeHash(state, firstPrompt)),
    on: (event, callback) => { heard.set(event, (heard.get(event) ?? new Set()).add(callback)); },
    off: (event, callback) => { heard.get(event)?.delete(callback); },
  };
}
