// The rungs of a claim as a table: value with its interval against what random heads reach.
import type { Claim, Rung } from "./data";
import { scoreOf, type State } from "./state";
import { chance, number, percent, span, title } from "./words";

export function Rungs({ state, claim }: { state: State; claim: Claim }) {
  const open = (name: string) => {
    state.source.value = scoreOf(state, name) ? name : `test ${claim.role}`;
  };
  return (
    <>
    <div class="hw-wide" tabIndex={0} role="region" aria-label={`Evidence for ${claim.role}`}>
      <table class="hw-table hw-rungs">
        <thead>
          <tr>
            <th scope="col">Rung</th>
            <th scope="col">Value, 95 % interval</th>
            <th scope="col">Against null</th>
            <th scope="col" class="hw-number">Null</th>
            <th scope="col" class="hw-number">p (Holm)</th>
            <th scope="col" class="hw-number">n</th>
            <th scope="col">Holds</th>
          </tr>
        </thead>
        <tbody>
          {claim.rungs.map((one) => (
            <tr>
              <th scope="row">
                {one.step}
                <button type="button" class="hw-link hw-small" title="How this number was made" onClick={() => open(one.score)}>{title(one.score)}</button>
              </th>
              <td>{number(one.value)}<span class="hw-small hw-quiet">{span(one.low, one.high)}</span></td>
              <td><Interval rung={one} /></td>
              <td class="hw-number">{number(one.null)}</td>
              <td class="hw-number" title={`before correction ${chance(one.p)}`}>{chance(one.p_holm)}</td>
              <td class="hw-number">{one.n ?? "-"}</td>
              <td class={one.passed ? "hw-passed" : "hw-failed"}>
                {one.passed ? "yes" : "no"}
                {one.share !== null && <span class="hw-small hw-quiet" title="of what there was to lose or to restore">{percent(one.share)}</span>}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
    <p class="hw-small hw-quiet">The null, in grey, is what 95 in 100 random heads of the same layers stay below; p compares with that head. The share is of what there was to lose or to restore.</p>
    </>
  );
}

const WIDTH = 88;

function Interval({ rung }: { rung: Rung }) {
  const marks = [rung.value, rung.low, rung.high, rung.null].filter((x): x is number => x !== null);
  if (rung.value === null || marks.length === 0) return <span class="hw-quiet">-</span>;
  const low = Math.min(0, ...marks);
  const reach = Math.max(0, ...marks) - low || 1;
  const x = (value: number) => 5 + ((value - low) / reach) * (WIDTH - 10);
  const text = `value ${number(rung.value)}${rung.null === null ? "" : `, null ${number(rung.null)}`}`;
  return (
    <svg class="hw-interval" width={WIDTH} height="20" viewBox={`0 0 ${WIDTH} 20`} role="img" aria-label={text}>
      <line x1={x(0)} x2={x(0)} y1="2" y2="18" class="hw-axis" />
      {rung.null !== null && <rect x={Math.min(x(0), x(rung.null))} width={Math.abs(x(rung.null) - x(0))} y="5" height="10" class="hw-null" />}
      {rung.null !== null && <line x1={x(rung.null)} x2={x(rung.null)} y1="3" y2="17" class="hw-null-edge" />}
      {rung.low !== null && rung.high !== null && <line x1={x(rung.low)} x2={x(rung.high)} y1="10" y2="10" class="hw-whisker" />}
      <circle cx={x(rung.value)} cy="10" r="3.6" class={rung.passed ? "hw-dot-passed" : "hw-dot-failed"} />
    </svg>
  );
}
