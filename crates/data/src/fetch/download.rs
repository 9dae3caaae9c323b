//! One file over HTTP, resumed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use super::{FetchError, file_error};

/// Tries that bring nothing, in a row, before giving up.
const TRIES: u32 = 3;
/// A server that is silent for so long has cut the line.
const SILENCE: Duration = Duration::from_secs(60);

/// How one request ended.
enum End {
    /// The file is whole, as far as the server says.
    Whole,
    /// Cut off, with the reason.
    Cut(String),
}

/// Fetches `address` into `part`, going on from what `part` holds. A cut line is taken up again as long as tries bring
/// bytes; then the error tells the last reason and `part` stays.
pub(super) fn download(
    address: &str,
    part: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(SILENCE))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .user_agent(concat!("anyformer/", env!("CARGO_PKG_VERSION")));
    let config = match ["http://127.0.0.1", "http://localhost"]
        .iter()
        .any(|own| address.starts_with(own))
    {
        true => config.proxy(None),
        false => config,
    };
    let agent: ureq::Agent = config.build().into();
    let mut idle = 0;
    loop {
        let had = size(part);
        let reason = match request(&agent, address, part, had, progress)? {
            End::Whole => return Ok(()),
            End::Cut(reason) => reason,
        };
        idle = if size(part) > had { 0 } else { idle + 1 };
        if idle == TRIES {
            return Err(FetchError::Transfer {
                address: address.to_string(),
                message: reason,
            });
        }
    }
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |data| data.len())
}

/// Start and length of the whole file in `bytes START-END/LENGTH` or `bytes */LENGTH`.
fn content_range(text: &str) -> (Option<u64>, Option<u64>) {
    let Some((range, length)) = text.trim_start_matches("bytes").trim().split_once('/') else {
        return (None, None);
    };
    let start = range
        .split_once('-')
        .and_then(|(start, _)| start.trim().parse().ok());
    (start, length.trim().parse().ok())
}

fn request(
    agent: &ureq::Agent,
    address: &str,
    part: &Path,
    had: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<End, FetchError> {
    let fail = |message: String| FetchError::Transfer {
        address: address.to_string(),
        message,
    };
    // Compression on the way would make ranges mean something else.
    let mut request = agent.get(address).header("Accept-Encoding", "identity");
    if had > 0 {
        request = request.header("Range", format!("bytes={had}-"));
    }
    let mut response = match request.call() {
        Ok(response) => response,
        Err(
            error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::HostNotFound),
        ) => {
            return Err(fail(error.to_string()));
        }
        Err(error) => return Ok(End::Cut(error.to_string())),
    };
    let status = response.status().as_u16();
    let range = response
        .headers()
        .get("content-range")
        .and_then(|value| value.to_str().ok());
    let (start, length) = range.map_or((None, None), content_range);
    let length = length.or(response.body().content_length().filter(|_| status == 200));
    let mut done = match status {
        206 if start == Some(had) => had,
        206 => {
            return Err(fail(format!(
                "asked for the bytes from {had} on, and the server sent others"
            )));
        }
        // The server knows no ranges: from the start again.
        200 => 0,
        416 if length == Some(had) => return Ok(End::Whole),
        // What is here is longer than the file: it is something else.
        416 => {
            std::fs::remove_file(part).map_err(file_error("delete", part))?;
            return Ok(End::Cut("the server has no such range".into()));
        }
        500..=599 | 408 | 429 => {
            return Ok(End::Cut(format!(
                "the server answered with status {status}"
            )));
        }
        _ => return Err(fail(format!("the server answered with status {status}"))),
    };
    let mut file = match done {
        0 => File::create(part),
        _ => OpenOptions::new().append(true).open(part),
    }
    .map_err(file_error("write", part))?;
    let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; 1 << 16];
    let end = loop {
        match body.read(&mut buffer) {
            Ok(0) => break End::Whole,
            Ok(count) => {
                file.write_all(&buffer[..count])
                    .map_err(file_error("write", part))?;
                done += count as u64;
                progress(done);
            }
            Err(error) => break End::Cut(format!("the line was cut after {done} bytes: {error}")),
        }
    };
    file.sync_all().map_err(file_error("write", part))?;
    // A server that closes early without saying how long the body is cannot be told from one that is done; the checksum can.
    Ok(match (end, length) {
        (End::Whole, Some(length)) if done < length => {
            End::Cut(format!("the line was cut after {done} of {length} bytes"))
        }
        (end, _) => end,
    })
}
