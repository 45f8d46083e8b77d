// The map's twin: the same heads and numbers as a table that can be sorted.
import { useState } from "preact/hooks";
import { LADDER } from "./data";
import { rankOf, rankText, scoreOf, type State } from "./state";
import { RoleChip, Verdict } from "./small";
import { number, span, title } from "./words";

type Order = [column: string, down: boolean];

export function HeadTable({ state }: { state: State }) {
  const { data } = state;
  const score = scoreOf(state, state.colour.value);
  const [order, setOrder] = useState<Order>(["head", false]);
  const passed = (unit: string) => {
    const steps = new Set((data.claims[unit] ?? []).flatMap((claim) => claim.rungs.filter((rung) => rung.passed).map((rung) => rung.step)));
    return LADDER.filter((one) => steps.has(one));
  };
  const keys: Record<string, (i: number) => string | number> = {
    head: (i) => i,
    role: (i) => data.heads[i]!.role,
    verdict: (i) => ["proved", "unknown", "refuted"].indexOf(data.heads[i]!.verdict),
    "passed rungs": (i) => -passed(data.heads[i]!.unit).length,
    value: (i) => score?.value[i] ?? -Infinity,
  };
  const key = keys[order[0]] ?? keys.head!;
  const list = data.heads.map((_, i) => i).filter((i) => !state.role.value || data.heads[i]!.role === state.role.value);
  list.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    return (x < y ? -1 : x > y ? 1 : 0) * (order[1] ? -1 : 1) || a - b;
  });
  const column = (name: string, label = name, wide = "") => (
    <th scope="col" class={wide} aria-sort={order[0] === name ? (order[1] ? "descending" : "ascending") : "none"}>
      <button type="button" class="hw-sort" onClick={() => setOrder([name, order[0] === name ? !order[1] : name === "value"])}>
        {label}
        <span aria-hidden="true">{order[0] === name ? (order[1] ? " \u2193" : " \u2191") : ""}</span>
      </button>
    </th>
  );
  return (
    <div class="hw-scroll" tabIndex={0} role="region" aria-label="Table of heads">
      <table class="hw-table">
        <thead>
          <tr>
            {column("head", "Head")}
            {column("role", "Role")}
            {column("verdict", "Verdict")}
            {column("passed rungs", "Passed rungs")}
            {score && column("value", title(score.name), "hw-number")}
            {score && <th scope="col" class="hw-number">95 % interval</th>}
            {score && <th scope="col" class="hw-number">Rank</th>}
          </tr>
        </thead>
        <tbody>
          {list.map((i) => {
            const head = data.heads[i]!;
            return (
              <tr class={head.unit === state.unit.value ? "hw-here" : ""}>
                <th scope="row"><button type="button" class="hw-link" onClick={() => { state.unit.value = head.unit; }}>{head.unit}</button></th>
                <td>{head.role === "unknown" ? <span class="hw-quiet">unknown</span> : <RoleChip role={head.role} verdict={head.verdict} />}</td>
                <td><Verdict verdict={head.verdict} /></td>
                <td>{passed(head.unit).join(", ")}</td>
                {score && <td class="hw-number">{number(score.value[i])}</td>}
                {score && <td class="hw-number">{span(score.low[i]!, score.high[i]!)}</td>}
                {score && <td class="hw-number">{rankText(rankOf(score, i))}</td>}
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}
