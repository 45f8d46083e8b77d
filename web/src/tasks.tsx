// What the claims rest on: how well the model does each task, and what was left out, with the reason.
import type { State } from "./state";
import { number, title } from "./words";

type Ability = Record<string, number | null>;

export function Tasks({ state }: { state: State }) {
  const tasks = Object.entries((state.data.about.tasks ?? {}) as Record<string, Ability>);
  const skipped = Object.entries((state.data.about.skipped ?? {}) as Record<string, string>);
  if (!tasks.length && !skipped.length) return null;
  return (
    <section class="hw-panel hw-tasks" aria-label="Tasks">
      <div class="hw-bar"><h2>Tasks</h2><span class="hw-quiet hw-small">a role is proved only on a task that the model can do</span></div>
      {tasks.length > 0 && (
        <div class="hw-wide" tabIndex={0} role="region" aria-label="How well the model does each task">
          <table class="hw-table">
            <thead>
              <tr>
                <th scope="col">Task</th>
                <th scope="col" class="hw-number">Right</th>
                <th scope="col" class="hw-number">Answer, clean (nats)</th>
                <th scope="col" class="hw-number">Answer, corrupt (nats)</th>
                <th scope="col" class="hw-number">Prompts</th>
              </tr>
            </thead>
            <tbody>
              {tasks.map(([name, done]) => (
                <tr>
                  <th scope="row">{title(name)}</th>
                  <td class="hw-number">{number(done.accuracy)}</td>
                  <td class="hw-number">{number(done.clean)}</td>
                  <td class="hw-number">{number(done.corrupt)}</td>
                  <td class="hw-number">{number(done.n)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {skipped.length > 0 && (
        <details class="hw-more">
          <summary>Left out: {skipped.length}</summary>
          <dl class="hw-facts">{skipped.map(([name, reason]) => <div><dt>{title(name)}</dt><dd>{reason}</dd></div>)}</dl>
        </details>
      )}
    </section>
  );
}
