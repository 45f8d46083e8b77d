// Small parts that several views share.
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { roleLook, dark, type Look } from "./colour";
import type { Head } from "./data";
import { pieces } from "./words";

export function Swatch({ look, proved }: { look: Look; proved?: boolean }) {
  return (
    <span class={`hw-swatch${look.barred ? " hw-barred" : ""}`} style={{ background: look.fill, color: look.ink, borderColor: look.edge }} aria-hidden="true">
      {look.mark}
      {proved && <Badge />}
    </span>
  );
}

/** The mark of a proved head: a white disc with a tick, drawn, so that it looks the same everywhere. */
export function Badge() {
  return (
    <svg class="hw-badge" viewBox="0 0 12 12" aria-hidden="true">
      <circle cx="6" cy="6" r="5.4" fill="#fff" stroke="#1b1d21" stroke-width="1.2" />
      <path d="M3.4 6.2l1.8 1.8 3.4-3.8" fill="none" stroke="#1b1d21" stroke-width="1.6" />
    </svg>
  );
}

export function RoleChip({ role, verdict }: { role: string; verdict: Head["verdict"] }) {
  dark.value;
  return (
    <span class="hw-chip">
      <Swatch look={roleLook(role, verdict === "proved")} />
      {role}
    </span>
  );
}

export function Verdict({ verdict }: { verdict: Head["verdict"] }) {
  return (
    <span class={`hw-verdict hw-${verdict}`}>
      {verdict === "proved" && <Badge />}
      {verdict}
    </span>
  );
}

export function Token({ text }: { text: string }) {
  return <>{pieces(text).map((piece) => (piece.glyph ? <span class="hw-glyph">{piece.text}</span> : piece.text))}</>;
}

export function Copy({ text, children }: { text: () => string; children: ComponentChildren }) {
  const [said, say] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      say("Copied");
    } catch {
      say(copyByHand(text()) ? "Copied" : "Select the text and copy it");
    }
    setTimeout(() => say(""), 2000);
  };
  return (
    <button type="button" class="hw-button" onClick={copy}>
      <span aria-live="polite">{said || children}</span>
    </button>
  );
}

/** Pages opened as files have no clipboard in some browsers; a selected text field still can be copied. */
function copyByHand(text: string): boolean {
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

export function Choice(props: { label: string; value: string; options: [string, string][]; onPick: (value: string) => void }) {
  return (
    <div class="hw-choice" role="group" aria-label={props.label}>
      {props.options.map(([value, name]) => (
        <button type="button" aria-pressed={props.value === value} onClick={() => props.onPick(value)}>{name}</button>
      ))}
    </div>
  );
}
