// Numbers and tokens as a reader sees them.

export function number(value: number | null | undefined): string {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e5) return String(value).replace("-", "\u2212");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("-", "\u2212").replace("e\u2212", "e-").replace("e+", "e");
  const text = size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : value.toFixed(3);
  return text.replace("-", "\u2212");
}

export const span = (low: number | null, high: number | null) =>
  low === null || high === null ? "" : `${number(low)} to ${number(high)}`;

export const percent = (share: number) => `${Math.round(100 * share)} %`.replace("-", "\u2212");

export function chance(p: number | null): string {
  if (p === null) return "-";
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

const GLYPHS: Record<string, string> = { " ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", "\u00a0": "\u237d", "\u200b": "\u2205" };

/** Byte-level BPE and SentencePiece write a leading space as a letter of their own. */
const RAW: Record<string, string> = { "\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\u2581": " " };

export interface Piece { text: string; glyph: boolean }

/** A token in pieces; what cannot be seen is a glyph that can. */
export function pieces(token: string): Piece[] {
  if (token === "") return [{ text: "\u2205", glyph: true }];
  const found: Piece[] = [];
  for (const letter of token) {
    const plain = RAW[letter] ?? letter;
    const code = plain.codePointAt(0)!;
    const hidden = GLYPHS[plain] ?? (code < 32 || (code >= 127 && code < 160) ? `U+${code.toString(16).padStart(4, "0")}` : undefined);
    const last = found[found.length - 1];
    if (last && last.glyph === (hidden !== undefined)) last.text += hidden ?? plain;
    else found.push({ text: hidden ?? plain, glyph: hidden !== undefined });
  }
  return found;
}

export const visible = (token: string) => pieces(token).map((piece) => piece.text).join("");
export const breaksLine = (token: string) => /[\n\u010a]/.test(token);

const isPlain = (value: unknown) => value === null || ["string", "number", "boolean"].includes(typeof value);

/** Nested provenance as rows of a name and a text. */
export function rows(value: Record<string, unknown>, under = ""): [string, string][] {
  return Object.entries(value).flatMap(([key, item]): [string, string][] => {
    const name = under ? `${under} ${key}` : key;
    if (isPlain(item)) return [[name, item === null ? "none" : String(item)]];
    if (Array.isArray(item) && item.every(isPlain)) return [[name, item.join(", ")]];
    return Object.keys(item as object).length ? rows(item as Record<string, unknown>, name) : [];
  });
}

/** A score's name as words. */
export const title = (name: string) => name.replace(/_/g, " ");
