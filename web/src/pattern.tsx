// Where a head looks on a stored prompt: the prompt's tokens shaded by weight, the matrix, the strongest links.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { opening, patternOf, strongest, telling, type Pattern } from "./attention";
import { attendTint, dark, sequential } from "./colour";
import type { Prompt } from "./data";
import { headOf, promptOf, type State } from "./state";
import { Choice, Token } from "./small";
import { breaksLine, number, visible } from "./words";

const layerName = (unit: string) => unit.slice(0, unit.lastIndexOf(".H"));

function usePattern(state: State, prompt: Prompt | undefined): Pattern | undefined {
  const unit = state.unit.value;
  const [found, keep] = useState<{ key: string; pattern?: Pattern }>({ key: "" });
  const key = `${unit} ${prompt?.id}`;
  useEffect(() => {
    let current = true;
    const head = headOf(state, unit);
    if (prompt && head) void patternOf(prompt, layerName(unit), head.index).then((pattern) => { if (current) keep({ key, pattern }); });
    return () => { current = false; };
  }, [key]);
  return found.key === key ? found.pattern : undefined;
}

export function PatternPanel({ state }: { state: State }) {
  const { data, side, token } = state;
  dark.value;
  const prompt = promptOf(state);
  const pattern = usePattern(state, prompt);
  const [near, setNear] = useState(-1);
  useEffect(() => setNear(-1), [state.unit.value, state.prompt.value]);
  const unit = state.unit.value;
  const stored = prompt && layerName(unit) in prompt.layers;
  const size = pattern ? (side.value === "query" ? pattern.queries : pattern.keys) : 0;
  const fixed = token.value >= 0 && token.value < size ? token.value : -1;
  const chosen = near >= 0 && near < size ? near : fixed >= 0 ? fixed : pattern ? opening(pattern) : -1;
  return (
    <section class="hw-panel hw-pattern" aria-label="Attention pattern">
      <div class="hw-bar">
        <h2>Pattern of {unit || "no head"}</h2>
        <span class="hw-space" />
        <Choice
          label="What the chosen token is"
          value={side.value}
          options={[["query", "Looks at"], ["key", "Is looked at by"]]}
          onPick={(value) => { side.value = value; }}
        />
      </div>
      {!data.patterns.length && <p class="hw-quiet">This atlas holds no patterns of prompts.</p>}
      {data.patterns.length > 0 && <Prompts state={state} />}
      {prompt && !stored && <p class="hw-quiet">The patterns of this layer were not stored for this prompt.</p>}
      {stored && !pattern && <p class="hw-quiet">Opening the pattern.</p>}
      {pattern && prompt && (
        <div class="hw-pattern-body">
          <div>
            <Strip state={state} pattern={pattern} chosen={chosen} onNear={setNear} />
            <Links state={state} pattern={pattern} chosen={chosen} />
          </div>
          <Matrix pattern={pattern} chosen={chosen} side={side.value} unit={unit} onNear={setNear} onFix={(at) => { token.value = at; }} />
        </div>
      )}
    </section>
  );
}

/** One small matrix a prompt; the button chooses the prompt. */
function Prompts({ state }: { state: State }) {
  return (
    <div class="hw-prompts" role="group" aria-label="Prompts">
      {state.data.patterns.map((prompt) => <Thumb state={state} prompt={prompt} />)}
    </div>
  );
}

function Thumb({ state, prompt }: { state: State; prompt: Prompt }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const pattern = usePattern(state, prompt);
  const shade = dark.value;
  useEffect(() => { if (canvas.current && pattern) paint(canvas.current, pattern); }, [pattern, shade]);
  return (
    <button type="button" class="hw-thumb" aria-pressed={state.prompt.value === prompt.id} title={prompt.text} onClick={() => { state.token.value = -1; state.prompt.value = prompt.id; }}>
      <canvas ref={canvas} aria-hidden="true" />
      <span>{prompt.id.replace(/_/g, " ")}</span>
      <small title="Strongest link that goes neither to the token itself nor to the first token">{pattern ? `up to ${number(telling(pattern).weight)}` : " "}</small>
    </button>
  );
}

function paint(canvas: HTMLCanvasElement, pattern: Pattern) {
  const { queries, keys } = pattern;
  if (!queries || !keys) return;
  canvas.width = keys;
  canvas.height = queries;
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(keys, queries);
  const ramp = Array.from({ length: 256 }, (_, i) => sequential(Math.sqrt(i / 255)));
  for (let query = 0; query < queries; query++) {
    for (let key = 0; key < keys; key++) {
      const [r, g, b] = ramp[Math.round(pattern.at(query, key) * 255)]!;
      image.data.set([r, g, b, 255], (query * keys + key) * 4);
    }
  }
  context.putImageData(image, 0, 0);
}

interface Aim { state: State; pattern: Pattern; chosen: number }

const weightOf = (pattern: Pattern, side: string, chosen: number, i: number) =>
  side === "query" ? pattern.at(chosen, i) : pattern.at(i, chosen);

function Strip({ state, pattern, chosen, onNear }: Aim & { onNear: (at: number) => void }) {
  const root = useRef<HTMLDivElement>(null);
  const moved = useRef(false);
  const side = state.side.value;
  const shown = side === "query" ? pattern.keys : pattern.queries;
  useLayoutEffect(() => {
    if (!moved.current) return;
    moved.current = false;
    root.current?.querySelector<HTMLElement>('[tabindex="0"]')?.focus();
  });
  const key = (event: KeyboardEvent) => {
    const last = pattern.tokens.length - 1;
    const next: Record<string, number> = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: last };
    const to = next[event.key];
    if (to === undefined) return;
    event.preventDefault();
    moved.current = true;
    onNear(-1);
    state.token.value = Math.min(last, Math.max(0, to));
  };
  const under = (event: Event) => Number((event.target as HTMLElement).closest<HTMLElement>("[data-at]")?.dataset.at ?? -1);
  return (
    <div
      ref={root}
      class="hw-strip"
      role="listbox"
      aria-label={side === "query" ? "Tokens: choose who looks" : "Tokens: choose who is looked at"}
      onKeyDown={key}
      onMouseOver={(event) => onNear(under(event))}
      onMouseLeave={() => onNear(-1)}
      onClick={(event) => { const at = under(event); if (at >= 0) state.token.value = at; }}
    >
      {pattern.tokens.map((text, i) => {
        const weight = i < shown ? weightOf(pattern, side, chosen, i) : 0;
        return (
          <>
            <span
              role="option"
              data-at={i}
              aria-selected={i === chosen}
              aria-label={`${i} ${visible(text)}, weight ${number(weight)}`}
              tabIndex={i === chosen ? 0 : -1}
              class={`hw-token${i === chosen ? " hw-chosen" : ""}`}
              style={{ background: attendTint(weight) }}
              title={`${i}: ${number(weight)}`}
            >
              <Token text={text} />
            </span>
            {breaksLine(text) && <br />}
          </>
        );
      })}
    </div>
  );
}

function Links({ state, pattern, chosen }: Aim) {
  const side = state.side.value;
  const size = side === "query" ? pattern.keys : pattern.queries;
  const own = Array.from({ length: size }, (_, i) => ({ i, weight: weightOf(pattern, side, chosen, i) }))
    .sort((a, b) => b.weight - a.weight)
    .slice(0, 4)
    .filter((one) => one.weight >= 0.005);
  const name = (i: number) => <span class="hw-piece"><Token text={pattern.tokens[i] ?? String(i)} /></span>;
  return (
    <>
      <p class="hw-reading">
        {name(chosen)} <span class="hw-quiet">at {chosen} {side === "query" ? "looks at" : "is looked at by"}</span>{" "}
        {own.length ? own.map(({ i, weight }) => <span class="hw-nowrap">{name(i)} <span class="hw-quiet">{number(weight)}</span> </span>) : <span class="hw-quiet">nothing above 0.005</span>}
      </p>
      <h3>Strongest links here</h3>
      <ol class="hw-links">
        {strongest(pattern, 8).map(({ query, key, weight }) => (
          <li>
            <button type="button" class="hw-link" onClick={() => { state.side.value = "query"; state.token.value = query; }}>
              {name(query)} <span aria-hidden="true">&rarr;</span><span class="hw-hidden">looks at</span> {name(key)}
            </button>
            <span class="hw-quiet">{number(weight)}, {query === key ? "itself" : Math.abs(query - key) === 1 ? "1 away" : `${Math.abs(query - key)} away`}</span>
          </li>
        ))}
      </ol>
    </>
  );
}

interface MatrixProps { pattern: Pattern; chosen: number; side: string; unit: string; onNear: (at: number) => void; onFix: (at: number) => void }

function Matrix({ pattern, chosen, side, unit, onNear, onFix }: MatrixProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const shade = dark.value;
  useEffect(() => { if (canvas.current) paint(canvas.current, pattern); }, [pattern, shade]);
  const under = (event: MouseEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const part = side === "query" ? (event.clientY - box.top) / box.height : (event.clientX - box.left) / box.width;
    const size = side === "query" ? pattern.queries : pattern.keys;
    return Math.min(size - 1, Math.max(0, Math.floor(part * size)));
  };
  const at = (100 * chosen) / (side === "query" ? pattern.queries : pattern.keys);
  const thick = 100 / (side === "query" ? pattern.queries : pattern.keys);
  return (
    <figure class="hw-matrix">
      <div class="hw-matrix-frame" style={{ aspectRatio: `${pattern.keys} / ${pattern.queries}` }}>
        <canvas
          ref={canvas}
          role="img"
          aria-label={`Attention of ${unit}: ${pattern.queries} queries down, ${pattern.keys} keys across`}
          onMouseMove={(event) => onNear(under(event))}
          onMouseLeave={() => onNear(-1)}
          onClick={(event) => onFix(under(event))}
        />
        <span class="hw-line-mark" aria-hidden="true" style={side === "query" ? { top: `${at}%`, height: `${thick}%`, left: 0, right: 0 } : { left: `${at}%`, width: `${thick}%`, top: 0, bottom: 0 }} />
      </div>
      <figcaption class="hw-small hw-quiet">Queries down, keys across. Shade follows the square root of the weight.</figcaption>
    </figure>
  );
}
