//! Chat templates: how a conversation becomes the text that a model was trained to answer. The folder's own Jinja template
//! is run, as transformers does it.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::HubError;
use crate::model::ModelFolder;

/// The template in a file of its own.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The template among other keys.
pub(crate) const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Steps after which a template is stopped.
const FUEL: u64 = 10_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: &str) -> Self {
        Message {
            role: role.to_string(),
            content: content.to_string(),
        }
    }
}

/// The template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    tokens: [String; 2],
    path: std::path::PathBuf,
}

impl ChatTemplate {
    /// The template of a folder or GGUF file, where there is one.
    pub fn of(folder: &ModelFolder) -> Result<Option<Self>, HubError> {
        let wrong = |reason: String| HubError::Template {
            path: folder.path.clone(),
            reason,
        };
        let config = match folder.text(TOKENIZER_CONFIG_FILE)? {
            None => Value::Null,
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| wrong(format!("{TOKENIZER_CONFIG_FILE} is not JSON: {error}")))?,
        };
        let source = match (&folder.gguf, folder.text(TEMPLATE_FILE)?) {
            (Some(gguf), _) => gguf.keys.get("tokenizer.chat_template").and_then(text),
            (None, Some(source)) => Some(source),
            (None, None) => named(&config["chat_template"]),
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let special = |name: &str| match &folder.gguf {
            None => text(&config[format!("{name}_token")]).unwrap_or_default(),
            Some(gguf) => {
                let id = &gguf.keys.get(&format!("tokenizer.ggml.{name}_token_id"));
                let id = id.and_then(Value::as_u64).unwrap_or(u64::MAX) as usize;
                let tokens = gguf.keys.get("tokenizer.ggml.tokens");
                let token = tokens.and_then(|tokens| tokens.get(id)).and_then(text);
                token.unwrap_or_default()
            }
        };
        let tokens = [special("bos"), special("eos")];
        Self::new(&source, tokens)
            .map(|template| {
                Some(ChatTemplate {
                    path: folder.path.clone(),
                    ..template
                })
            })
            .map_err(|error| wrong(error.to_string()))
    }

    /// Its begin and end tokens.
    pub(crate) fn tokens(&self) -> &[String; 2] {
        &self.tokens
    }

    /// A template out of its text, for models whose begin and end tokens are `tokens`.
    pub fn new(source: &str, tokens: [String; 2]) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source.to_string())?;
        Ok(ChatTemplate {
            environment,
            source: source.to_string(),
            tokens,
            path: std::path::PathBuf::new(),
        })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. With `answer`, it ends where the assistant's answer begins.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String, HubError> {
        let [bos_token, eos_token] = &self.tokens;
        let template = self.environment.get_template("chat");
        let rendered = template.and_then(|template| {
            template.render(context! {
                messages, bos_token, eos_token, add_generation_prompt => answer,
                tools => None::<()>, documents => None::<()>,
            })
        });
        rendered.map_err(|error| HubError::Template {
            path: self.path.clone(),
            reason: error
                .detail()
                .map_or_else(|| error.to_string(), str::to_string),
        })
    }
}

/// As Jinja in Python writes JSON for templates: unescaped, with spaces after commas and colons.
fn to_json(value: minijinja::Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let fail =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let value = serde_json::to_value(&value).map_err(fail)?;
    let mut bytes = Vec::new();
    let result = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut bytes, Spaced,
        )),
        Some(width) => {
            let pad = vec![b' '; width.min(64)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&pad);
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut bytes, pretty,
            ))
        }
    };
    result.map_err(fail)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// A token or template is a text, or a table that holds it.
fn text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_string)
}

/// The only template, or of several the one called `default`.
fn named(value: &Value) -> Option<String> {
    match value {
        Value::Array(several) => {
            let default = several.iter().find(|one| one["name"] == "default");
            default.and_then(|one| text(&one["template"]))
        }
        one => text(one),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, ["<s>".into(), "</s>".into()]).expect("a template")
    }

    #[test]
    fn a_conversation_becomes_the_models_text() {
        let turns = [Message::new("user", " Hi\n")];
        let text = template(CHATML).render(&turns, true).expect("renders");
        assert_eq!(
            text,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role.startswith('u') %}\n{{ {'a': [1, m.content]} | tojson }}{% endif %}\n{% endfor %}{{ eos_token }}";
        let text = template(source).render(&turns[..], false).expect("renders");
        assert_eq!(text, "<s>\n{\"a\": [1, \" Hi\\n\"]}</s>");
    }

    #[test]
    fn what_a_template_refuses_and_what_never_ends_is_an_error() {
        let refuses = template("{{ raise_exception('Roles must alternate') }}");
        let error = refuses.render(&[], true).expect_err("refused").to_string();
        assert!(error.contains("Roles must alternate"), "{error}");
        let long = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(template(long).render(&[], true).is_err());
        assert!(ChatTemplate::new("{% for %}", [String::new(), String::new()]).is_err());
    }
}
