// The map: one cell a head, layers from left to right, coloured by role or by one score.
import { useLayoutEffect, useRef } from "preact/hooks";
import { dark, headLook, scaleOf, type Look, type Scale } from "./colour";
import { LADDER, type Head, type Stack } from "./data";
import { planSentence, shownPlan, treatmentOf, type Treatment } from "./plans";
import { headOf, rankOf, scoreOf, type State } from "./state";
import { Badge, Choice } from "./small";
import { HeadTable } from "./table";
import { number, span, title } from "./words";

export function HeadMap({ state }: { state: State }) {
  const { data, colour, view } = state;
  dark.value;
  const score = scoreOf(state, colour.value);
  const scale = score && scaleOf(score);
  return (
    <section class="hw-panel hw-map" aria-label="Map of all heads">
      <div class="hw-bar">
        <h2>Map</h2>
        <label class="hw-field">
          <span>Colour by</span>
          <select value={colour.value} onChange={(event) => { colour.value = event.currentTarget.value; }}>
            <option value="roles">roles</option>
            {LADDER.filter((step) => data.scores.some((one) => one.evidence === step)).map((step) => (
              <optgroup label={step}>
                {data.scores.filter((one) => one.evidence === step).map((one) => <option value={one.name}>{title(one.name)}</option>)}
              </optgroup>
            ))}
          </select>
        </label>
        {scale && <Ramp scale={scale} />}
        <span class="hw-space" />
        <Choice label="Show heads as" value={view.value} options={[["grid", "Grid"], ["table", "Table"]]} onPick={(value) => { view.value = value; }} />
      </div>
      {view.value === "table" ? <HeadTable state={state} /> : data.stacks.map((stack) => <Grid state={state} stack={stack} scale={scale} />)}
      <Reading state={state} />
      {data.tradeoffs && <PlanShown state={state} />}
    </section>
  );
}

function Ramp({ scale }: { scale: Scale }) {
  const text = `Scale from ${number(scale.low)} to ${number(scale.high)}${scale.both ? ", zero in the middle" : ""}`;
  return (
    <span class="hw-ramp" role="img" aria-label={text}>
      <span>{number(scale.low)}</span>
      <span class="hw-ramp-colours" style={{ background: scale.ramp }}>{scale.both && <span class="hw-ramp-zero">0</span>}</span>
      <span>{number(scale.high)}</span>
    </span>
  );
}

/** What is under the pointer, else what is selected. The line keeps its place, so nothing jumps. */
function Reading({ state }: { state: State }) {
  const unit = state.hover.value || state.unit.value;
  const head = headOf(state, unit);
  const plan = shownPlan(state);
  const treatment = plan && treatmentOf(state, plan, unit);
  if (!head) return <p class="hw-reading">No head is selected.</p>;
  const i = state.place.get(unit)!;
  const score = scoreOf(state, state.colour.value);
  const rank = score && rankOf(score, i);
  return (
    <p class="hw-reading">
      <b>{unit}</b> {head.role === "unknown" ? "unknown" : `${head.role}, ${head.verdict}`}
      {score && <> &middot; {title(score.name)} {number(score.value[i])}{span(score.low[i]!, score.high[i]!) && ` (${span(score.low[i]!, score.high[i]!)})`}</>}
      {rank && <> &middot; rank {rank.rank}{rank.equal > 1 && `, as ${rank.equal - 1} more,`} of {rank.of}</>}
      {treatment && <> &middot; {treatment.kv}: {treatment.all ? "full" : treatment.text}</>}
    </p>
  );
}

/** Its room is kept while no plan is shown: dots lie below the map and must not move away from the pointer. */
function PlanShown({ state }: { state: State }) {
  const plan = shownPlan(state);
  const text = plan ? planSentence(plan) : "";
  return <p class="hw-plan-shown" title={text}>{text}</p>;
}

interface Cell { head: Head; look: Look; name: string; dim: boolean; treatment?: Treatment }

/** A head as a cell. While a plan is shown, heads whose KV head it keeps in full are ringed, and the others fade. */
function cellOf(state: State, head: Head, i: number, scale?: Scale): Cell {
  const cell = plainCell(state, head, i, scale);
  const plan = shownPlan(state);
  const treatment = plan && treatmentOf(state, plan, head.unit);
  if (!treatment) return cell;
  return { ...cell, treatment, dim: cell.dim || !treatment.all, name: `${cell.name}, ${treatment.kv} ${treatment.all ? "full" : treatment.text}` };
}

function plainCell(state: State, head: Head, i: number, scale?: Scale): Cell {
  const score = scoreOf(state, state.colour.value);
  const dim = state.role.value !== "" && head.role !== state.role.value;
  const label = head.role === "unknown" ? "unknown" : `${head.role}, ${head.verdict}`;
  if (!score || !scale) return { head, look: headLook(head), name: `${head.unit}, ${label}`, dim };
  const value = score.value[i];
  const name = `${head.unit}, ${title(score.name)} ${value === null ? "no value" : number(value)}, ${label}`;
  if (value === null || value === undefined) return { head, look: { ...headLook({ ...head, verdict: "unknown", role: "unknown" }), mark: "" }, name, dim };
  const { fill, ink } = scale.at(value);
  return { head, look: { fill, ink, mark: "", barred: false, edge: "transparent" }, name, dim };
}

function Grid({ state, stack, scale }: { state: State; stack: Stack; scale?: Scale }) {
  const root = useRef<HTMLDivElement>(null);
  const moved = useRef(false);
  const heads = state.data.heads.filter((head) => head.stack === stack.name);
  const at = (layer: number, index: number) => heads.find((head) => head.layer === layer && head.index === index);
  const table = new Map(heads.map((head) => [`${head.layer}.${head.index}`, head]));
  const selected = headOf(state, state.unit.value);
  const inHere = selected?.stack === stack.name;
  const entry = inHere ? state.unit.value : heads[0]?.unit;

  // Before the next key: one that comes between drawing and focus would move on from the cell before.
  useLayoutEffect(() => {
    if (!moved.current) return;
    moved.current = false;
    root.current?.querySelector<HTMLElement>('[tabindex="0"]')?.focus();
  });

  const move = (event: KeyboardEvent) => {
    const now = headOf(state, (event.target as HTMLElement).dataset.unit ?? "");
    if (!now) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      state.unit.value = now.unit;
      const card = root.current?.closest(".hw")?.querySelector<HTMLElement>(".hw-card h2");
      if (event.key === "Enter") card?.focus();
      return;
    }
    const next = step(event, now, stack, at);
    if (!next) return;
    event.preventDefault();
    moved.current = true;
    state.unit.value = next.unit;
  };
  const under = (event: Event) => (event.target as HTMLElement).closest<HTMLElement>("[data-unit]")?.dataset.unit ?? "";

  return (
    <div class={`hw-grid-frame${Math.max(stack.layers.length, stack.width) > 44 ? " hw-many" : ""}`} style={{ "--hw-columns": stack.layers.length, "--hw-rows": stack.width }}>
      {stack.title && <h3>{stack.title}</h3>}
      <div
        ref={root}
        class="hw-grid"
        role="grid"
        aria-label={`${stack.title || "Heads"}: ${stack.layers.length} layers across, ${stack.width} heads down`}
        aria-rowcount={stack.width + 1}
        aria-colcount={stack.layers.length + 1}
        onKeyDown={move}
        onClick={(event) => { const unit = under(event); if (unit) { state.unit.value = unit; } }}
        onMouseOver={(event) => { state.hover.value = under(event); }}
        onMouseLeave={() => { state.hover.value = ""; }}
      >
        <div role="row" class="hw-row hw-row-top">
          <span role="columnheader" class="hw-corner">layer</span>
          {stack.layers.map((layer, i) => (
            <span role="columnheader" aria-label={`layer ${layer}`} class={i % 5 && stack.layers.length > 16 ? "hw-thin" : ""}>{layer}</span>
          ))}
        </div>
        {Array.from({ length: stack.width }, (_, index) => (
          <div role="row" class="hw-row">
            <span role="rowheader" aria-label={`head ${index}`} class={index % 4 && stack.width > 16 ? "hw-thin" : ""}>H{index}</span>
            {stack.layers.map((layer) => {
              const head = table.get(`${layer}.${index}`);
              if (!head) return <span role="gridcell" class="hw-cell hw-none" aria-label={`layer ${layer} has no head ${index}`} />;
              const { look, name, dim, treatment } = cellOf(state, head, state.place.get(head.unit)!, scale);
              const chosen = head.unit === state.unit.value;
              return (
                <span
                  role="gridcell"
                  data-unit={head.unit}
                  aria-label={name}
                  aria-selected={chosen}
                  tabIndex={head.unit === entry ? 0 : -1}
                  class={`hw-cell${chosen ? " hw-chosen" : ""}${dim ? " hw-dim" : ""}${treatment?.all ? " hw-full" : ""}${look.barred ? " hw-barred" : ""}`}
                  style={{ background: look.fill, color: look.ink, borderColor: look.edge }}
                >
                  <span aria-hidden="true">{look.mark}</span>
                  {head.verdict === "proved" && <Badge />}
                </span>
              );
            })}
          </div>
        ))}
      </div>
    </div>
  );
}

type At = (layer: number, index: number) => Head | undefined;

/** The head that a key leads to; cells without a head are stepped over. */
function step(event: KeyboardEvent, now: Head, stack: Stack, at: At): Head | undefined {
  const across = stack.layers;
  const walk = (column: number, row: number, dx: number, dy: number): Head | undefined => {
    for (; across[column] !== undefined && row >= 0 && row < stack.width; column += dx, row += dy) {
      const hit = at(across[column]!, row);
      if (hit) return hit;
    }
    return undefined;
  };
  const column = across.indexOf(now.layer);
  switch (event.key) {
    case "ArrowRight": return walk(column + 1, now.index, 1, 0);
    case "ArrowLeft": return walk(column - 1, now.index, -1, 0);
    case "ArrowDown": return walk(column, now.index + 1, 0, 1);
    case "ArrowUp": return walk(column, now.index - 1, 0, -1);
    case "Home": return walk(0, event.ctrlKey ? 0 : now.index, 1, 0);
    case "End": return walk(across.length - 1, event.ctrlKey ? stack.width - 1 : now.index, -1, 0);
    default: return undefined;
  }
}
