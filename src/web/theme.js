// Light or dark: the system's choice until the person makes their own.
import { signal } from "./vendor/preact.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const chosen = signal(document.documentElement.dataset.theme ?? null);
const systemDark = signal(system.matches);
system.addEventListener("change", (event) => {
  systemDark.value = event.matches;
});

export const isDark = () => (chosen.value ? chosen.value === "dark" : systemDark.value);

/** Switches; choosing what the system says anyway goes back to following it. */
export function toggleTheme() {
  const next = isDark() ? "light" : "dark";
  const follows = (next === "dark") === systemDark.value;
  chosen.value = follows ? null : next;
  try {
    if (follows) {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("gantry.theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("gantry.theme", next);
    }
  } catch {
    // Storage is blocked: the choice holds for this visit.
  }
}
