//! Words that keys are made of.

pub(super) static ADJECTIVES: &[&str] = &[
    "ample", "azure", "brisk", "calm", "chilly", "clever", "curly", "dapper", "eager", "early",
    "faint", "fancy", "fierce", "gentle", "giddy", "grand", "hasty", "hollow", "humble", "jolly",
    "keen", "lively", "lucky", "mellow", "merry", "mild", "misty", "modest", "narrow", "nimble",
    "noble", "odd", "plain", "proud", "quaint", "quiet", "rapid", "rare", "rosy", "rough", "shiny",
    "silent", "sleek", "steady", "sturdy", "subtle", "sunny", "tidy", "vivid", "witty",
];

pub(super) static NOUNS: &[&str] = &[
    "anchor", "apple", "barn", "basket", "beacon", "bridge", "candle", "canyon", "castle", "cedar",
    "cliff", "cloud", "compass", "copper", "coral", "drum", "eagle", "ember", "feather", "fiddle",
    "forest", "garden", "glacier", "hammer", "harbor", "island", "kettle", "ladder", "lantern",
    "lemon", "maple", "marble", "meadow", "mirror", "needle", "oyster", "pebble", "pillow",
    "planet", "pocket", "quilt", "raven", "ribbon", "river", "saddle", "spoon", "temple",
    "thunder", "violin", "window",
];
