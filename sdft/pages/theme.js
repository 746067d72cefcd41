"use strict";
// Light or dark: what was chosen before, else what the system has. The button has the id "theme".

const THEME = "sdft theme";

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const other = theme === "dark" ? "light" : "dark";
  at("theme").textContent = other === "dark" ? "Dark" : "Light";
  at("theme").setAttribute("aria-label", `Switch to the ${other} theme`);
  at("theme").onclick = () => {
    setTheme(other);
    try {
      localStorage.setItem(THEME, other);
    } catch {
      // Without storage, the choice lasts until the page is closed.
    }
  };
}

function startTheme() {
  setTheme(stored(THEME) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
}
