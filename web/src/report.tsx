// The report page: map, card and pattern around one selected head.
import { Card } from "./card";
import { CircuitPanel } from "./circuit";
import { HeadMap } from "./grid";
import { pageModel } from "./host";
import { live } from "./live";
import { mountable } from "./mount";
import { PatternPanel } from "./pattern";
import { Roles } from "./roles";
import { Spread } from "./spread";
import type { State } from "./state";
import { Tasks } from "./tasks";
import { TradeoffsPanel } from "./tradeoffs";
import { TrainingPanel } from "./training";

function Report({ state }: { state: State }) {
  return (
    <>
      <Top state={state} />
      <main class="hw-page">
        <div class="hw-left">
          <HeadMap state={state} />
          <TrainingPanel state={state} />
          <CircuitPanel state={state} />
          <TradeoffsPanel state={state} />
          <Spread state={state} />
          <PatternPanel state={state} />
          <Roles state={state} />
          <Tasks state={state} />
        </div>
        <div class="hw-right">
          <Card state={state} />
        </div>
      </main>
      <footer class="hw-foot">
        <p>
          Made by headwise from {state.data.atlas}. Colour maps batlow and vik by Fabio Crameri; role colours by Okabe and Ito.
          This file holds all it shows and asks no other place for anything.
        </p>
      </footer>
    </>
  );
}

const FACTS: [key: string, name: string][] = [
  ["model_type", "type"], ["layers", "layers"], ["heads", "heads a layer"], ["kv_heads", "KV heads a layer"],
  ["fingerprint", "weights"], ["created", "made"], ["version", "headwise"],
];

function Top({ state }: { state: State }) {
  const { about, summary } = state.data;
  const model = String(about.model ?? "model");
  const facts = FACTS.filter(([key]) => about[key] !== undefined && about[key] !== null);
  const show = (key: string, value: unknown) => {
    if (key === "layers" && Array.isArray(value)) return String(value.length);
    if (key === "created") return String(value).slice(0, 10);
    if (typeof value !== "object") return String(value);
    const different = [...new Set(Object.values(value as object).map(Number))].sort((a, b) => a - b);
    return different.length > 1 ? `${different[0]} to ${different.at(-1)}` : String(different[0] ?? "none");
  };
  return (
    <header class="hw-top">
      <p class="hw-mark">headwise</p>
      <h1>{model}</h1>
      <p class="hw-summary">{summary}</p>
      <dl class="hw-line">{facts.map(([key, name]) => <div><dt>{name}</dt><dd>{show(key, about[key])}</dd></div>)}</dl>
    </header>
  );
}

const data = JSON.parse(document.getElementById("headwise-data")!.textContent!);
const el = document.getElementById("headwise-report")!;
el.replaceChildren();
if (data.live) live(data, el);
else mountable(Report).render({ model: pageModel(data), el });
