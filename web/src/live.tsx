// The page of an experiment that is being trained: one run in the Training view, followed by the script that the run writes.
import { signal } from "@preact/signals";
import type { Data, Training } from "./data";
import { pageModel } from "./host";
import { mountable } from "./mount";
import { TrainingPanel } from "./training";

/** What the script of a run hands over. */
interface Told { step: number; of: number; done: boolean; training: Training | null }
interface Seen { at: number; told: Told }

const PAUSE = 1000;

let told: Told | null = null;
let asked = 0;

/** Run the script that lies in the folder of a run; null where there is none. */
function load(place: string): Promise<Told | null> {
  return new Promise((done) => {
    told = null;
    const script = document.createElement("script");
    script.onload = script.onerror = () => { script.remove(); done(told); };
    // Asked for under a name of its own each time, so that no old answer is kept.
    script.src = `${place.split("/").map(encodeURIComponent).join("/")}/training.js?${++asked}`;
    document.head.append(script);
  });
}

export function live(data: Data & Required<Pick<Data, "live">>, el: HTMLElement) {
  const { runs } = data.live;
  const model = pageModel(data);
  (window as any).headwiseTold = (given: Told) => { told = given; };
  const seen = signal<Seen | null>(null);
  const run = signal(String(model.get("run") ?? ""));
  let wake = () => {};
  model.on("change:run", () => { run.value = String(model.get("run") ?? ""); wake(); });
  const choose = (place: string) => { model.set("run", place); model.save_changes(); run.value = place; wake(); };

  const show = (next: Seen) => {
    seen.value = next;
    model.put("data", { ...data, training: next.told.training });
  };
  let first = 0;
  /** Look at the chosen run, or at the first that is not done; whether there is more to come. */
  async function look(): Promise<boolean> {
    const chosen = runs.findIndex((one) => one.place === run.value);
    if (chosen >= 0) {
      const got = await load(runs[chosen]!.place);
      if (got) show({ at: chosen, told: got });
      return !got?.done;
    }
    let newest: Seen | null = null;
    for (;;) {
      const got = await load(runs[first]!.place);
      if (got?.training || (got && !newest && !seen.value)) newest = { at: first, told: got };
      if (!got?.done || first === runs.length - 1) break;
      first += 1;
    }
    if (newest) show(newest);
    return !(newest?.told.done && newest.at === runs.length - 1);
  }
  async function follow() {
    for (;;) {
      const more = document.hidden || (await look());
      await new Promise<void>((done) => { wake = done; if (more) setTimeout(done, PAUSE); });
    }
  }

  const Live = mountable(({ state }) => (
    <>
      <header class="hw-top">
        <p class="hw-mark">headwise</p>
        <h1>{String(data.about.model)}</h1>
        <p class="hw-summary">{sentence(seen.value)}</p>
        <label class="hw-field hw-run">
          <span>Run</span>
          <select value={run.value} onChange={(event) => choose(event.currentTarget.value)}>
            <option value="">the one that is being trained</option>
            {runs.map((one) => <option value={one.place}>{one.name}</option>)}
          </select>
        </label>
      </header>
      <main class="hw-live"><TrainingPanel state={state} empty="Nothing is measured yet." /></main>
      <footer class="hw-foot"><p>Made by headwise. This page follows the files that lie beside it and asks no other place for anything.</p></footer>
    </>
  ));
  function sentence(now: Seen | null): string {
    if (!now) return data.summary;
    const { step, of, done } = now.told;
    const where = done ? `done after ${step.toLocaleString("en")} steps` : `step ${step.toLocaleString("en")} of ${of.toLocaleString("en")}`;
    return `Run ${now.at + 1} of ${runs.length}, ${runs[now.at]!.name}: ${where}.`;
  }
  Live.render({ model, el });
  void follow();
}
