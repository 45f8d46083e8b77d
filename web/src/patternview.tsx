import { mountable } from "./mount";
import { PatternPanel } from "./pattern";

export default mountable(PatternPanel);
