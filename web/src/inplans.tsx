// On the head card: what each plan does with the KV head that this head reads from, and the scores that chose it.
import type { Plan } from "./data";
import { treatmentOf, verdictOf } from "./plans";
import type { State } from "./state";
import { number, title } from "./words";

export function InPlans({ state }: { state: State }) {
  const unit = state.unit.value;
  const found = (state.data.tradeoffs?.plans ?? []).flatMap((plan) => {
    const treatment = treatmentOf(state, plan, unit);
    return treatment ? [{ plan, treatment }] : [];
  });
  if (!found.length) return null;
  return (
    <>
      <h3>In plans, as {found[0]!.treatment.kv}</h3>
      <ul class="hw-inplans">
        {found.map(({ plan, treatment }) => (
          <li>
            <b>{plan.name}</b>{verdictOf(plan) && <span class="hw-quiet"> ({verdictOf(plan)})</span>}: {treatment.all ? "kept in full" : treatment.text}
            <span class="hw-quiet hw-small">{evidence(plan, treatment.kv)}</span>
          </li>
        ))}
      </ul>
    </>
  );
}

/** "need 0.31, rank 2 of 90": 1 is the highest. The score that the plan was chosen by comes first. */
function evidence(plan: Plan, kv: string): string {
  const mine = Object.entries(plan.scores[kv] ?? {});
  mine.sort(([a], [b]) => Number(b === plan.about.ranking) - Number(a === plan.about.ranking));
  const all = Object.values(plan.scores);
  const parts = mine.map(([name, value]) => {
    const above = all.filter((one) => (one[name] ?? -Infinity) > (value ?? -Infinity)).length;
    return `${title(name)} ${number(value)}, rank ${above + 1} of ${all.length}`;
  });
  return parts.join("; ");
}
