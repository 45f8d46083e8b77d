import { CircuitPanel } from "./circuit";
import { mountable } from "./mount";

export default mountable(({ state }) => (
  <CircuitPanel state={state} empty="This atlas holds no graph yet: headwise why makes one, and atlas.add_graph keeps one of yours." />
));
