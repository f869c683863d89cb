// The API key: asked for when the server wants one, kept for as long as the tab is open.

const STORED = "llmcad-mlx.key";
const byId = (id) => document.getElementById(id);

export class ApiKey {
  value = "";

  constructor() {
    try {
      this.value = sessionStorage.getItem(STORED) ?? "";
    } catch {
      // storage is off: the key lives as long as the page
    }
  }

  /**
   * Ask for a key. True when there is a new one, false when the user would rather not.
   * @param {string} reason  what the server said
   */
  ask(reason) {
    const dialog = byId("key");
    byId("key-reason").textContent = reason;
    byId("key-value").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    byId("key-cancel").onclick = () => dialog.close();
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      this.#keep(byId("key-value").value.trim());
      dialog.close("given");
    };
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
    });
  }

  #keep(key) {
    this.value = key;
    try {
      sessionStorage.setItem(STORED, key);
    } catch {
      // as above
    }
  }
}
