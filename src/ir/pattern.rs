//! Dotted-path patterns: a run of whole path segments, with `*` inside a segment.

use regex_lite::{Regex, RegexBuilder};

/// Memory of one compiled expression: a plan may have thousands of them.
const MOST_REGEX_BYTES: usize = 64 << 10;

/// A pattern over parameter names. `mlp.gate` matches `a.mlp.gate.weight` and not
/// `a.mlp.gate_proj.weight`; `*` stands for any characters inside one segment; `re:` in front
/// makes it a regular expression over the whole name.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Segments(Vec<String>),
    Regex(Regex),
}

impl Pattern {
    /// # Errors
    /// The reason, where the text is empty, has an empty segment or is no regular expression.
    pub fn new(text: &str) -> Result<Self, String> {
        let kind = match text.strip_prefix("re:") {
            Some(expr) => {
                let built = RegexBuilder::new(expr).size_limit(MOST_REGEX_BYTES).build();
                Kind::Regex(built.map_err(|e| e.to_string())?)
            }
            None => {
                let segments: Vec<String> = text.split('.').map(str::to_owned).collect();
                if segments.iter().any(String::is_empty) {
                    return Err(format!("`{text}` has an empty path segment"));
                }
                Kind::Segments(segments)
            }
        };
        Ok(Pattern { text: text.to_owned(), kind })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn matches(&self, name: &str) -> bool {
        match &self.kind {
            Kind::Regex(regex) => regex.is_match(name),
            Kind::Segments(wanted) => {
                let have: Vec<&str> = name.split('.').collect();
                have.windows(wanted.len())
                    .any(|run| run.iter().zip(wanted).all(|(h, w)| segment_matches(w, h)))
            }
        }
    }
}

fn segment_matches(pattern: &str, segment: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == segment };
    let Some(mut left) = segment.strip_prefix(head) else { return false };
    let parts: Vec<&str> = rest.split('*').collect();
    for (i, part) in parts.iter().enumerate() {
        if i + 1 == parts.len() {
            return left.ends_with(part);
        }
        match left.find(part) {
            Some(at) => left = &left[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    // Names and right results: field case "Ignore patterns select exactly the named modules".
    #[test]
    fn segments_match_whole() {
        let names = [
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.3.mlp.gate.weight",
            "model.layers.3.mlp.gate.e_score_correction_bias",
            "model.layers.3.mlp.experts.0.gate_proj.weight",
            "model.layers.3.mlp.shared_experts.gate_proj.weight",
            "model.layers.3.mlpXgate.weight",
            "lm_head.weight",
        ];
        let list = ["mlp.gate", "lm_head"].map(|p| Pattern::new(p).unwrap());
        let kept: Vec<&str> =
            names.into_iter().filter(|n| list.iter().any(|p| p.matches(n))).collect();
        assert_eq!(
            kept,
            [
                "model.layers.3.mlp.gate.weight",
                "model.layers.3.mlp.gate.e_score_correction_bias",
                "lm_head.weight"
            ]
        );
    }

    #[test]
    fn stars_stay_inside_a_segment() {
        let p = Pattern::new("attn.*_scale").unwrap();
        assert!(p.matches("model.layers.0.self_attn.attn.k_scale"));
        assert!(!p.matches("model.layers.0.self_attn.attn.k.x_scale"));
        assert!(Pattern::new("a*b*c").unwrap().matches("x.a1b2c.y"));
        assert!(!Pattern::new("a*b*c").unwrap().matches("x.a1c2b.y"));
        assert!(Pattern::new("re:^model\\.layers\\.7\\.").unwrap().matches("model.layers.7.x"));
        assert!(Pattern::new("a..b").is_err() && Pattern::new("").is_err());
    }
}
