// How every number was made: the provenance that each score and each test carries.
import { useEffect, useRef } from "preact/hooks";
import type { State } from "./state";
import { rows, title } from "./words";

export function Provenance({ state }: { state: State }) {
  const { scores, tests, claims } = state.data;
  const root = useRef<HTMLDetailsElement>(null);
  const wanted = state.source.value;
  const roles = (claims[state.unit.value] ?? []).map((claim) => claim.role);
  useEffect(() => { if (wanted) root.current?.querySelector(".hw-wanted")?.scrollIntoView({ block: "center" }); }, [wanted]);
  if (!scores.length && !roles.length) return null;
  return (
    <details class="hw-more" ref={root} open={wanted !== ""}>
      <summary>How these numbers were made</summary>
      {roles.map((role) => <Source name={`test ${role}`} kind="needed, enough" about={tests[role] ?? {}} wanted={wanted} />)}
      {scores.map((score) => (
        <Source name={score.name} kind={score.evidence} about={score.about} wanted={wanted} note={score.kind === "kv" ? "one number a KV head, shown on each query head that reads it" : ""} />
      ))}
    </details>
  );
}

function Source(props: { name: string; kind: string; about: Record<string, unknown>; wanted: string; note?: string }) {
  const here = props.name === props.wanted;
  const facts = rows(props.about);
  return (
    <details open={here} class={here ? "hw-wanted" : ""}>
      <summary>{title(props.name)} <span class="hw-quiet">{props.kind}</span></summary>
      <dl class="hw-facts">
        {facts.map(([name, text]) => <div><dt>{name}</dt><dd>{text}</dd></div>)}
        {!facts.length && <div><dt>provenance</dt><dd>none was kept</dd></div>}
        {props.note && <div><dt>unit</dt><dd>{props.note}</dd></div>}
      </dl>
    </details>
  );
}
