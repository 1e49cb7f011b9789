// The websocket: the same events that any Realtime client uses, see inference/PROTOCOL.md.

const KEY_PROTOCOL = "openai-insecure-api-key.";

export class Realtime extends EventTarget {
  /** Every server event is dispatched under its own type, with the event as `detail`; "closed" when the socket ends. */
  constructor(key) {
    super();
    const url = new URL("v1/realtime?model=flowomni", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url, key ? ["realtime", KEY_PROTOCOL + key] : ["realtime"]);
    this.socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      this.dispatchEvent(new CustomEvent(event.type, { detail: event }));
    };
    this.socket.onclose = ({ code, reason }) => this.dispatchEvent(new CustomEvent("closed", { detail: { code, reason } }));
  }

  on(type, handler) {
    this.addEventListener(type, ({ detail }) => handler(detail));
    return this;
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  close() { this.socket.close(); }
}
