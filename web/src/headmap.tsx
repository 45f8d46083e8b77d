import { HeadMap } from "./grid";
import { mountable } from "./mount";
import { Roles } from "./roles";
import { Spread } from "./spread";

export default mountable(({ state }) => <><HeadMap state={state} /><Spread state={state} /><Roles state={state} /></>);
