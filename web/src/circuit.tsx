// Circuit: what carries an answer from the tokens through heads and MLPs to the logits, and how much of it.
import { useState } from "preact/hooks";
import { CircuitGraph } from "./circuitgraph";
import { amount, codeFor, countOf, edgeOf, edgeSentence, gapOf, graphOf, keyOf, nodeOf, nodeSentence, placeName, targetName, workbench } from "./circuits";
import type { Circuit, CircuitEdge, CircuitNode, Question } from "./data";
import { Choice, Copy } from "./small";
import type { State } from "./state";
import { number, percent, rows, title } from "./words";

export function CircuitPanel({ state, empty }: { state: State; empty?: string }) {
  const held = state.data.circuits;
  const graph = graphOf(state);
  const out = Object.entries(held?.left_out ?? {});
  if (!graph && !out.length && !empty) return null;
  return (
    <section class="hw-panel hw-circuit" aria-label="Circuit">
      {graph ? <Panel state={state} graph={graph} /> : <><div class="hw-bar"><h2>Circuit</h2></div><p class="hw-quiet">{out.length ? "No graph of this atlas can be shown." : empty}</p></>}
      {out.length > 0 && (
        <details class="hw-more">
          <summary>Graphs left out: {out.length}</summary>
          <dl class="hw-facts">{out.map(([name, reason]) => <div><dt>{name}</dt><dd>{reason}</dd></div>)}</dl>
        </details>
      )}
    </section>
  );
}

function Panel({ state, graph }: { state: State; graph: Circuit }) {
  const [over, setOver] = useState("");
  const graphs = state.data.circuits!.graphs;
  const count = countOf(state, graph);
  const shown = graph.edges.slice(0, count);
  const pick = (name: string) => {
    state.node.value = name === state.node.value ? "" : name;
    if (state.place.has(name)) state.unit.value = name;
  };
  return (
    <>
      <div class="hw-bar">
        <h2>Circuit</h2>
        {graphs.length > 1 && (
          <label class="hw-field">
            <span>Graph</span>
            <select value={graph.name} onChange={(event) => { state.graph.value = event.currentTarget.value; state.node.value = ""; state.edges.value = 0; }}>
              {graphs.map((one) => <option value={one.name}>{one.title}</option>)}
            </select>
          </label>
        )}
        <span class="hw-space" />
        <Threshold state={state} graph={graph} count={count} />
      </div>
      {graph.question ? <Asked asked={graph.question} /> : <p class="hw-sentence">{graph.title}</p>}
      <CircuitGraph state={state} graph={graph} edges={shown} over={over} onOver={setOver} onPick={pick} />
      <p class="hw-reading">{reading(state, graph, shown, over)}</p>
      <Legend graph={graph} shown={shown} />
      <Numbers state={state} graph={graph} shown={shown} pick={pick} />
      <Table state={state} graph={graph} shown={shown} pick={pick} />
      <Code state={state} graph={graph} count={count} />
      <details class="hw-more">
        <summary>How this graph was made</summary>
        <dl class="hw-facts">{rows(graph.about).map(([name, text]) => <div><dt>{name}</dt><dd>{text}</dd></div>)}</dl>
      </details>
    </>
  );
}

/** Few edges to the left, all to the right; the least of those shown is the threshold. */
function Threshold({ state, graph, count }: { state: State; graph: Circuit; count: number }) {
  const least = amount(graph, Math.abs(graph.edges[count - 1]?.weight ?? 0)).replace("+", "");
  const says = `${count} of ${graph.edges_in_all} edges, each at least ${least}`;
  return (
    <label class="hw-field hw-threshold">
      <span>Threshold</span>
      <input type="range" min="1" max={graph.edges.length} step="1" value={count} aria-valuetext={says} onInput={(event) => { state.edges.value = Number(event.currentTarget.value); }} />
      <output>{says}</output>
    </label>
  );
}

function Asked({ asked }: { asked: Question }) {
  const how: Record<string, string> = { given: "a contrast that was given", exchanged: "the two exchanged in the prompt", random: "random tokens where it matters most" };
  const contrast = asked.task === undefined ? `${how[asked.how ?? ""] ?? asked.how}: ${asked.contrast?.[0] ?? ""}` : `corrupt prompts; ${asked.prompts?.[1] ?? 0} prompts that had no say in choosing the graph`;
  return (
    <>
      {asked.task === undefined
        ? <p class="hw-sentence">{asked.prompt} <b>{asked.answer}</b>, not {asked.instead}</p>
        : <p class="hw-sentence"><b>{title(asked.task)}</b>, the whole task</p>}
      <p class="hw-small hw-quiet">{asked.metric} {number(asked.clean)}; {number(asked.corrupt)} with {contrast}</p>
      <p class={`hw-verdict-line ${asked.explains ? "hw-passed" : "hw-failed"}`}>{asked.says}</p>
    </>
  );
}

function reading(state: State, graph: Circuit, shown: CircuitEdge[], over: string): string {
  const name = over || state.node.value;
  const edge = edgeOf(graph, name);
  const node = nodeOf(graph, name);
  if (edge) return edgeSentence(graph, edge);
  return node ? nodeSentence(state, graph, node, shown) : "Point at a place or a line; press it for the numbers.";
}

function Legend({ graph, shown }: { graph: Circuit; shown: CircuitEdge[] }) {
  const gap = gapOf(graph);
  const line = (against: boolean) => <svg class="hw-keyline" viewBox="0 0 28 10" aria-hidden="true"><path d="M1 5H27" stroke={against ? "var(--hw-failed)" : "var(--hw-accent)"} stroke-width="3" stroke-dasharray={against ? "5 3" : undefined} /></svg>;
  return (
    <p class="hw-key">
      <span>{line(false)} speaks for the answer</span>
      {shown.some((edge) => (edge.weight ?? 0) < 0) && <span>{line(true)} speaks against it</span>}
      <span>the thicker a line, the larger its {gap ? "share of the difference" : "weight"}, {graph.evidence === "seen" ? "estimated" : "measured"}</span>
      <span>layers grow upwards; heads have the colours of their roles</span>
    </p>
  );
}

function Numbers({ state, graph, shown, pick }: { state: State; graph: Circuit; shown: CircuitEdge[]; pick: (name: string) => void }) {
  const edge = edgeOf(graph, state.node.value);
  const node = nodeOf(graph, state.node.value);
  if (!edge && !node) return null;
  return (
    <div class="hw-numbers">
      <div class="hw-bar">
        <h3 tabIndex={-1}>{edge ? `${placeName(graph, edge.source)} to ${edge.target}` : node!.kind === "token" ? placeName(graph, node!.name) : node!.name}</h3>
        <span class="hw-space" />
        <button type="button" class="hw-button" onClick={() => { state.node.value = ""; }}>Close</button>
      </div>
      {edge ? <EdgeFacts graph={graph} edge={edge} pick={pick} /> : <NodeFacts state={state} graph={graph} node={node!} shown={shown} pick={pick} />}
    </div>
  );
}

function EdgeFacts({ graph, edge, pick }: { graph: Circuit; edge: CircuitEdge; pick: (name: string) => void }) {
  const gap = gapOf(graph);
  const place = graph.edges.indexOf(edge) + 1;
  return (
    <dl class="hw-facts">
      <div><dt>from</dt><dd><button type="button" class="hw-link" onClick={() => pick(edge.source)}>{placeName(graph, edge.source)}</button></dd></div>
      <div><dt>into</dt><dd>{targetName(edge)}</dd></div>
      <div><dt>{graph.evidence === "seen" ? "estimated loss without it" : "loss without it"}</dt><dd>{number(edge.weight)}{edge.error === null ? "" : `, standard error ${number(edge.error)}`}</dd></div>
      {gap !== null && <div><dt>share of the difference</dt><dd>{amount(graph, edge.weight)} of {number(gap)}</dd></div>}
      <div><dt>place among the edges</dt><dd>{place} of {graph.edges_in_all}</dd></div>
    </dl>
  );
}

function NodeFacts({ state, graph, node, shown, pick }: { state: State; graph: Circuit; node: CircuitNode; shown: CircuitEdge[]; pick: (name: string) => void }) {
  const head = state.data.heads[state.place.get(node.name) ?? -1];
  const loss = graph.question?.losses[node.name];
  const reads = graph.edges.filter((edge) => edge.into.includes(node.name));
  const writes = graph.edges.filter((edge) => edge.source === node.name);
  return (
    <>
      {head && <p>{head.sentence}</p>}
      {graph.question && node.kind !== "logits" && <p>{loss === undefined ? "What the graph loses without it was not measured." : `Without it the graph loses ${percent(loss)} of the difference.`}</p>}
      <div class="hw-ends">
        <Ends graph={graph} edges={reads} shown={shown} title="Reads" pick={pick} name={(edge) => `${placeName(graph, edge.source)}${edge.target.split(".")[2] ? ` (${edge.target.split(".")[2]})` : ""}`} />
        <Ends graph={graph} edges={writes} shown={shown} title="Is read by" pick={pick} name={(edge) => edge.target} />
      </div>
    </>
  );
}

function Ends({ graph, edges, shown, title, name, pick }: {
  graph: Circuit; edges: CircuitEdge[]; shown: CircuitEdge[]; title: string; name: (edge: CircuitEdge) => string; pick: (name: string) => void;
}) {
  if (!edges.length) return null;
  return (
    <table class="hw-table">
      <thead><tr><th scope="col">{title}</th><th scope="col" class="hw-number">{gapOf(graph) === null ? "Weight" : "Share"}</th></tr></thead>
      <tbody>
        {edges.slice(0, 12).map((edge) => (
          <tr class={shown.includes(edge) ? "" : "hw-quiet"}>
            <th scope="row"><button type="button" class="hw-link" onClick={() => pick(keyOf(edge))}>{name(edge)}</button></th>
            <td class="hw-number">{amount(graph, edge.weight)}</td>
          </tr>
        ))}
        {edges.length > 12 && <tr><td colSpan={2} class="hw-quiet">and {edges.length - 12} smaller</td></tr>}
      </tbody>
    </table>
  );
}

/** The twin of the drawing. */
function Table({ state, graph, shown, pick }: { state: State; graph: Circuit; shown: CircuitEdge[]; pick: (name: string) => void }) {
  const gap = gapOf(graph);
  return (
    <details class="hw-more">
      <summary>All {shown.length} edges shown, as a table</summary>
      <div class="hw-wide hw-scroll" tabIndex={0} role="region" aria-label="Table of edges">
        <table class="hw-table">
          <thead>
            <tr>
              <th scope="col">From</th><th scope="col">Into</th>
              {gap !== null && <th scope="col" class="hw-number">Share</th>}
              <th scope="col" class="hw-number">Weight</th><th scope="col" class="hw-number">Error</th>
            </tr>
          </thead>
          <tbody>
            {shown.map((edge) => (
              <tr class={keyOf(edge) === state.node.value ? "hw-here" : ""}>
                <th scope="row"><button type="button" class="hw-link" onClick={() => pick(keyOf(edge))}>{placeName(graph, edge.source)}</button></th>
                <td>{edge.target}</td>
                {gap !== null && <td class="hw-number">{amount(graph, edge.weight)}</td>}
                <td class="hw-number">{number(edge.weight)}</td>
                <td class="hw-number">{number(edge.error)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

function Code({ state, graph, count }: { state: State; graph: Circuit; count: number }) {
  const [what, setWhat] = useState("chosen");
  if (!graph.code) return null;
  const text = what === "all" ? workbench(graph, count) : codeFor(graph, count, state.node.value);
  return (
    <details class="hw-more">
      <summary>Workbench: the Python that gives these numbers</summary>
      <div class="hw-code">
        <Choice label="Python of" value={what} options={[["chosen", "What is selected"], ["all", "Every number shown"]]} onPick={setWhat} />
        <pre tabIndex={0}><code>{text}</code></pre>
        <Copy text={() => text}>Copy as code</Copy>
      </div>
    </details>
  );
}
