// Colours of values and roles, all from headwise/view/palette.json.
import { signal } from "@preact/signals";
import palette from "../../headwise/view/palette.json";
import type { Head, Score } from "./data";

export const ROLES = Object.keys(palette.roles);
const roles = palette.roles as Record<string, { colour: string | null; mark: string; barred: boolean }>;

const query = typeof matchMedia === "function" ? matchMedia("(prefers-color-scheme: dark)") : undefined;
export const dark = signal(query?.matches ?? false);
query?.addEventListener("change", (event) => { dark.value = event.matches; });

const page = () => palette.page[dark.value ? "dark" : "light"];

type RGB = [number, number, number];

const parse = (hex: string): RGB => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)) as RGB;
const css = (rgb: RGB) => `rgb(${rgb.map(Math.round).join(" ")})`;
const mix = (a: RGB, b: RGB, t: number): RGB => a.map((x, i) => x + (b[i]! - x) * t) as RGB;

function luminance(rgb: RGB): number {
  const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4)) as RGB;
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Black or white, whichever reads better. */
const ink = (rgb: RGB) => (luminance(rgb) > 0.179 ? "#000" : "#fff");

function along(stops: string[], t: number): RGB {
  const x = Math.min(1, Math.max(0, t)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(x));
  return mix(parse(stops[i]!), parse(stops[i + 1]!), x - i);
}

/** Batlow from zero. It starts at the end nearer to the page and fades into the page close to zero, so that large values stand out. */
export function sequential(t: number): RGB {
  const rgb = along(palette.sequential, dark.value ? 0.12 + 0.88 * t : 0.86 * (1 - t));
  return mix(parse(page().sunk), rgb, Math.min(1, t / 0.18));
}
export const diverging = (t: number): RGB => along(palette.diverging, t);

export interface Scale {
  low: number;
  high: number;
  both: boolean;
  at: (value: number) => { fill: string; ink: string };
  ramp: string;
}

/** Diverging around zero when values have both signs, else sequential from zero. */
export function scaleOf(score: Score): Scale {
  const values = score.value.filter((value): value is number => value !== null);
  const least = Math.min(0, ...values);
  const most = Math.max(0, ...values);
  const both = least < 0 && most > 0;
  const reach = Math.max(-least, most) || 1;
  const colour = both ? (v: number) => diverging(0.5 + v / reach / 2) : (v: number) => sequential(Math.abs(v) / reach);
  const [low, high] = both ? [-reach, reach] : least < 0 ? [-reach, 0] : [0, reach];
  const stops = Array.from({ length: 33 }, (_, i) => css(colour(low + ((high - low) * i) / 32)));
  return {
    low,
    high,
    both,
    at: (value) => { const rgb = colour(value); return { fill: css(rgb), ink: ink(rgb) }; },
    ramp: `linear-gradient(to right, ${stops.join(",")})`,
  };
}

export interface Look { fill: string; ink: string; mark: string; barred: boolean; edge: string }

/** How a role is drawn: full colour where it is proved, a tint where the head only looks like it. */
export function roleLook(role: string, strong: boolean): Look {
  const entry = roles[role] ?? { colour: null, mark: role.slice(0, 1).toUpperCase(), barred: false };
  const ground = parse(page().absent);
  if (!entry.colour) return { fill: css(ground), ink: page().quiet, mark: "", barred: false, edge: "transparent" };
  const full = parse(entry.colour);
  const fill = strong ? full : mix(ground, full, dark.value ? 0.22 : 0.2);
  const needsEdge = dark.value && luminance(full) < 0.02;
  return {
    fill: css(fill),
    ink: strong ? ink(fill) : page().text,
    mark: entry.mark,
    barred: entry.barred,
    edge: needsEdge ? page().quiet : strong ? "transparent" : css(mix(ground, full, 0.6)),
  };
}

export const headLook = (head: Head): Look =>
  head.verdict === "refuted" ? { ...roleLook("unknown", false), mark: "\u00d7" } : roleLook(head.role, head.verdict === "proved");

/** The tint behind a token for a weight from 0 to 1, along its square root so that weak links show. */
export function attendTint(weight: number): string {
  const from = parse(page().panel);
  return css(mix(from, parse(page().attend), Math.sqrt(Math.min(1, Math.max(0, weight)))));
}
