// A classic script in the head: it runs before the first paint, so a chosen theme never flashes the other one.
try {
  const chosen = localStorage.getItem("gantry.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is blocked: the page follows the system.
}
