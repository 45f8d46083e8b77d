import { mountable } from "./mount";
import { TrainingPanel } from "./training";

export default mountable(({ state }) => (
  <TrainingPanel state={state} empty="This atlas holds no training: a run of the lab keeps a tape beside its atlas, and scores of several steps make curves too." />
));
