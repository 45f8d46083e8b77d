import { HeadMap } from "./grid";
import { mountable } from "./mount";
import { TradeoffsPanel } from "./tradeoffs";

export default mountable(({ state }) => (
  <>
    <TradeoffsPanel state={state} empty="This atlas holds no plan and no measured cache yet: headwise plan and headwise bench make them." />
    <HeadMap state={state} />
  </>
));
