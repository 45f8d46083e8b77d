import { Card } from "./card";
import { mountable } from "./mount";

export default mountable(Card);
