// The legend, which is also the result: every role with its proved heads and those that only look like it.
import { dark, headLook, roleLook, ROLES } from "./colour";
import type { State } from "./state";
import { Swatch } from "./small";

export function Roles({ state }: { state: State }) {
  dark.value;
  const { heads } = state.data;
  const present = [...new Set(heads.map((head) => head.role))].filter((role) => role !== "unknown");
  const order = (role: string) => (ROLES.indexOf(role) + ROLES.length) % ROLES.length;
  present.sort((a, b) => order(a) - order(b));
  const tested = heads.find((head) => head.verdict === "refuted");
  const unknown = heads.filter((head) => head.role === "unknown").length;
  return (
    <section class="hw-panel hw-roles" aria-label="Roles">
      <div class="hw-bar"><h2>Roles</h2></div>
      {!present.length && <p class="hw-quiet">No head has a role yet.</p>}
      <ul class="hw-plain">
        {present.map((role) => {
          const mine = heads.filter((head) => head.role === role);
          const proved = mine.filter((head) => head.verdict === "proved");
          const likely = mine.filter((head) => head.verdict === "unknown").length;
          const refuted = mine.length - proved.length - likely;
          const on = state.role.value === role;
          const rest = [likely && `${likely} only look like it`, refuted && `${refuted} refuted`].filter(Boolean).join(", ");
          return (
            <li>
              <button type="button" class="hw-role" aria-pressed={on} onClick={() => { state.role.value = on ? "" : role; }} title={`Such a head ${state.data.does[role] ?? "has this role"}. Press to show only this role.`}>
                <Swatch look={roleLook(role, true)} />
                {role}
              </button>
              <span class="hw-role-heads">
                {proved.map((head) => <a href={`#${head.unit}`} onClick={(event) => { event.preventDefault(); state.unit.value = head.unit; }}>{head.unit}</a>)}
                {!proved.length && <span class="hw-quiet">none proved</span>}
                {rest && <span class="hw-quiet">{rest.replace("1 only look like it", "1 only looks like it")}</span>}
              </span>
            </li>
          );
        })}
      </ul>
      <p class="hw-key">
        <span><Swatch look={roleLook(present[0] ?? "induction", true)} proved /> proved: needed and enough beat random heads</span>
        <span><Swatch look={roleLook(present[0] ?? "induction", false)} /> only looks like it</span>
        <span><Swatch look={roleLook("unknown", false)} /> no role seen: {unknown}</span>
        {tested && <span><Swatch look={headLook(tested)} /> tested and refuted</span>}
      </p>
    </section>
  );
}
