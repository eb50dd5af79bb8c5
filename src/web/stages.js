// The stages of a submission in a row, each with its state and how long it took.
import { html, useEffect, useState } from "./vendor/preact.js";
import { STAGES } from "./record.js";
import { duration } from "./format.js";

/** Often enough to look alive, seldom enough to cost nothing. */
const TICK_MS = 100;

const WORDS = { waiting: "waiting", started: "running", passed: "passed", failed: "failed", skipped: "skipped" };
const MARKS = { waiting: "", started: "", passed: "✓", failed: "✕", skipped: "–" };

function useTick(active) {
  const [, tick] = useState(0);
  useEffect(() => {
    if (!active) return;
    const timer = setInterval(() => tick((n) => n + 1), TICK_MS);
    return () => clearInterval(timer);
  }, [active]);
}

function timing(stage) {
  if (stage.state === "started") return duration(Math.max(0, Date.now() - stage.started));
  return stage.state === "passed" || stage.state === "failed" ? duration(stage.duration) : "";
}

/** Few programs depend on anything: of the others it is not shown. */
const happened = (name, stages) => name !== "install" || !["waiting", "skipped"].includes(stages[name].state);

export function Stages({ stages }) {
  const shown = STAGES.filter((name) => happened(name, stages));
  useTick(Object.values(stages).some((stage) => stage.state === "started"));
  return html`
    <ol class=${`stages${shown.length > 7 ? " many" : ""}`} aria-label="Stages">
      ${shown.map((name) => {
        const stage = stages[name];
        return html`
          <li key=${name} class=${`stage ${stage.state}`} data-stage=${name} data-state=${stage.state}>
            <span class="stage-mark" aria-hidden="true">${MARKS[stage.state]}</span>
            <span class="stage-name">${name}</span>
            <span class="visually-hidden">${WORDS[stage.state] ?? stage.state}</span>
            <span class="stage-time">${timing(stage)}</span>
          </li>
        `;
      })}
    </ol>
  `;
}
