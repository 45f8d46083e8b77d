// The form of an anywidget module around a view: state from the host's model, drawn into its element.
import { render as draw, type ComponentType } from "preact";
import type { Model } from "./data";
import { createState, type State } from "./state";

interface Given { model: Model; el: HTMLElement }

export function mountable(View: ComponentType<{ state: State }>) {
  return {
    render({ model, el }: Given) {
      const state = createState(model);
      el.classList.add("hw");
      draw(<View state={state} />, el);
      return () => { state.stop(); draw(null, el); };
    },
  };
}
