//! Against a server in this process, on 127.0.0.1.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::*;

/// How the server treats the requests, in order; the last one holds for all that follow.
#[derive(Clone, Copy)]
enum Answer {
    /// The file, or the range that was asked for.
    Good,
    /// So many bytes of it, then the line is cut.
    Cut(usize),
    /// The whole file whatever was asked for.
    NoRanges,
    /// An error status.
    Status(u16),
}

/// Serves `body` at every path; gives the address and the list of "PATH RANGE" that were asked for.
fn serve(body: Vec<u8>, answers: &'static [Answer]) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    std::thread::spawn(move || {
        for (count, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let path = lines
                .next()
                .unwrap()
                .unwrap()
                .split(' ')
                .nth(1)
                .unwrap()
                .to_string();
            let headers: Vec<String> = lines
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .map(|line| line.to_lowercase())
                .collect();
            let range = headers
                .iter()
                .find_map(|line| line.strip_prefix("range: bytes="));
            log.lock()
                .unwrap()
                .push(format!("{path} {}", range.unwrap_or("all")));
            let answer = answers[count.min(answers.len() - 1)];
            let start = match (answer, range) {
                (Answer::NoRanges, _) | (_, None) => 0,
                (_, Some(range)) => range.trim_end_matches('-').parse().unwrap(),
            };
            let total = body.len();
            let head = match answer {
                Answer::Status(status) => {
                    format!("HTTP/1.1 {status} Trouble\r\nContent-Length: 0\r\n")
                }
                _ if start >= total => {
                    format!(
                        "HTTP/1.1 416 Range\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\n"
                    )
                }
                _ if start > 0 => format!(
                    "HTTP/1.1 206 Part\r\nContent-Range: bytes {start}-{}/{total}\r\nContent-Length: {}\r\n",
                    total - 1,
                    total - start
                ),
                _ => format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n"),
            };
            let send = match answer {
                Answer::Status(_) => &[][..],
                Answer::Cut(bytes) => &body[start.min(total)..(start + bytes).min(total)],
                _ => &body[start.min(total)..],
            };
            let _ = write!(stream, "{head}Connection: close\r\n\r\n")
                .and_then(|()| stream.write_all(send));
        }
    });
    (address, asked)
}

fn body() -> Vec<u8> {
    (0..200_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn sum(bytes: &[u8]) -> &'static str {
    Box::leak(digest(bytes).unwrap().0.into_boxed_str())
}

fn set(file: RemoteFile) -> Dataset {
    let files = Box::leak(Box::new([file]));
    Dataset {
        name: "set",
        doc: "",
        licence: "",
        usage: "",
        shipped: false,
        files,
    }
}

fn file(name: &'static str, bytes: &[u8]) -> RemoteFile {
    let sha256 = Some(sum(bytes));
    // The canonical address leads nowhere: no test goes past 127.0.0.1.
    RemoteFile {
        name,
        base: "http://127.0.0.1:9/",
        bytes: Some(bytes.len() as u64),
        sha256,
        content_sha256: None,
        archive: false,
    }
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_cut_line_is_taken_up_where_it_was_cut() {
    let (address, asked) = serve(
        body(),
        &[Answer::Cut(70_000), Answer::Cut(50_000), Answer::Good],
    );
    let dest = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    let set = set(file("data.bin", &body()));
    let fetched = get_set(&set, dest.path(), Some(&address), &mut |done, total| {
        seen.push((done, total))
    })
    .unwrap();
    assert_eq!(
        std::fs::read(fetched.folder.join("data.bin")).unwrap(),
        body()
    );
    assert_eq!(names(&fetched.folder), ["data.bin"]);
    assert!(!fetched.present && fetched.unverified.is_empty());
    assert_eq!(
        *asked.lock().unwrap(),
        ["/data.bin all", "/data.bin 70000-", "/data.bin 120000-"]
    );
    assert_eq!(seen.last(), Some(&(200_000, Some(200_000))));
    assert!(seen.is_sorted());
    // It is there, so nothing is asked for.
    assert!(
        get_set(&set, dest.path(), Some(&address), &mut |_, _| ())
            .unwrap()
            .present
    );
    assert_eq!(asked.lock().unwrap().len(), 3);
}

#[test]
fn a_later_call_goes_on_and_a_server_without_ranges_starts_over() {
    for (answers, part) in [
        (&[Answer::Good][..], 90_000),
        (&[Answer::NoRanges], 90_000),
        (&[Answer::Good], 200_000),
    ] {
        let (address, asked) = serve(body(), answers);
        let dest = tempfile::tempdir().unwrap();
        let folder = dest.path().join("set");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("data.bin.part"), &body()[..part]).unwrap();
        get_set(
            &set(file("data.bin", &body())),
            dest.path(),
            Some(&address),
            &mut |_, _| (),
        )
        .unwrap();
        assert_eq!(std::fs::read(folder.join("data.bin")).unwrap(), body());
        assert_eq!(*asked.lock().unwrap(), [format!("/data.bin {part}-")]);
    }
}

#[test]
fn the_start_of_another_file_is_thrown_away() {
    for part in [50_000, 300_000] {
        let (address, _) = serve(body(), &[Answer::Good]);
        let dest = tempfile::tempdir().unwrap();
        let folder = dest.path().join("set");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("data.bin.part"), vec![7; part]).unwrap();
        get_set(
            &set(file("data.bin", &body())),
            dest.path(),
            Some(&address),
            &mut |_, _| (),
        )
        .unwrap();
        assert_eq!(std::fs::read(folder.join("data.bin")).unwrap(), body());
    }
}

#[test]
fn a_wrong_checksum_keeps_nothing() {
    let mut damaged = body();
    damaged[777] ^= 1;
    let (address, _) = serve(damaged, &[Answer::Good]);
    let dest = tempfile::tempdir().unwrap();
    let error = get_set(
        &set(file("data.bin", &body())),
        dest.path(),
        Some(&address),
        &mut |_, _| (),
    )
    .unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }));
    let text = error.to_string();
    assert!(
        text.contains(sum(&body())) && text.contains(&address),
        "{text}"
    );
    assert!(names(&dest.path().join("set")).is_empty());
}

#[test]
fn a_line_that_brings_nothing_ends_and_keeps_what_came() {
    let (address, asked) = serve(body(), &[Answer::Cut(1000), Answer::Status(503)]);
    let dest = tempfile::tempdir().unwrap();
    let set = set(file("data.bin", &body()));
    let error = get_set(&set, dest.path(), Some(&address), &mut |_, _| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("503"), "{error}");
    assert_eq!(asked.lock().unwrap().len(), 4);
    assert_eq!(
        std::fs::read(dest.path().join("set/data.bin.part")).unwrap(),
        body()[..1000]
    );
    let (address, asked) = serve(body(), &[Answer::Status(404)]);
    let error = get_set(&set, dest.path(), Some(&address), &mut |_, _| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("404") && error.contains(&address), "{error}");
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[test]
fn nobody_at_the_address_is_an_error() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let dest = tempfile::tempdir().unwrap();
    let from = format!("http://{free}/");
    let set = set(file("data.bin", &body()));
    let error = get_set(&set, dest.path(), Some(&from), &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, FetchError::Transfer { .. }), "{error}");
}

#[test]
fn a_local_copy_is_taken_packed_or_not() {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&body()).unwrap();
    let other_packing = packer.finish().unwrap();
    let mut wanted = file("data.gz", b"as published");
    wanted.content_sha256 = Some(sum(&body()));
    let set = set(wanted);
    for (name, content) in [("data.gz", &other_packing), ("data", &body())] {
        let (from, dest) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join(name), content).unwrap();
        for source in [from.path().to_path_buf(), from.path().join(name)] {
            let fetched = get_set(&set, dest.path(), source.to_str(), &mut |_, _| ()).unwrap();
            let mut plain = Vec::new();
            let packed = File::open(fetched.folder.join("data.gz")).unwrap();
            GzDecoder::new(packed).read_to_end(&mut plain).unwrap();
            assert_eq!(plain, body());
            std::fs::remove_dir_all(fetched.folder).unwrap();
        }
        std::fs::write(from.path().join(name), b"something else").unwrap();
        let error = get_set(&set, dest.path(), from.path().to_str(), &mut |_, _| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("nothing was kept") && error.contains(name),
            "{error}"
        );
        assert!(names(&dest.path().join("set")).is_empty());
    }
    let empty = tempfile::tempdir().unwrap();
    let error = get_set(&set, empty.path(), empty.path().to_str(), &mut |_, _| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("data.gz"), "{error}");
}

/// A `.tar.gz` with these files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::fast(),
    ));
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *content).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

#[test]
fn an_archive_becomes_the_folder() {
    let good = archive(&[("top/a.txt", b"one"), ("top/deep/b.txt", b"two")]);
    let mut wanted = file("set.tar.gz", &good);
    wanted.archive = true;
    let (address, asked) = serve(good, &[Answer::Good]);
    let dest = tempfile::tempdir().unwrap();
    let set_of = set;
    let set = set_of(wanted);
    let fetched = get_set(&set, dest.path(), Some(&address), &mut |_, _| ()).unwrap();
    assert_eq!(
        std::fs::read(fetched.folder.join("deep/b.txt")).unwrap(),
        b"two"
    );
    assert_eq!(names(dest.path()), ["set"]);
    assert!(
        get_set(&set, dest.path(), Some(&address), &mut |_, _| ())
            .unwrap()
            .present
    );
    assert_eq!(asked.lock().unwrap().len(), 1);
    // A checked archive that cannot be unpacked makes no folder.
    for bad in [
        archive(&[("a.txt", b"one"), ("b.txt", b"two")]),
        b"no archive".to_vec(),
    ] {
        let mut wanted = file("set.tar.gz", &bad);
        wanted.archive = true;
        let (address, _) = serve(bad, &[Answer::Good]);
        let dest = tempfile::tempdir().unwrap();
        let error =
            get_set(&set_of(wanted), dest.path(), Some(&address), &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, FetchError::Archive { .. }), "{error}");
        assert!(!dest.path().join("set").exists());
    }
}

#[test]
fn a_file_without_a_checksum_is_told() {
    let (address, _) = serve(body(), &[Answer::Good]);
    let mut wanted = file("data.bin", &body());
    wanted.sha256 = None;
    let dest = tempfile::tempdir().unwrap();
    // The address of the file itself will do too.
    let fetched = get_set(
        &set(wanted),
        dest.path(),
        Some(&format!("{address}/data.bin")),
        &mut |_, _| (),
    )
    .unwrap();
    assert_eq!(fetched.unverified, ["data.bin"]);
}

#[test]
fn the_list_is_sorted_and_its_sums_are_sums() {
    assert!(datasets().is_sorted_by_key(|set| set.name));
    for set in datasets() {
        assert_eq!(set.shipped, set.files.is_empty(), "{}", set.name);
        assert!(set.files.iter().filter(|file| file.archive).count() == 0 || set.files.len() == 1);
        for file in set.files {
            for sum in [file.sha256, file.content_sha256].into_iter().flatten() {
                assert!(
                    sum.len() == 64
                        && sum
                            .bytes()
                            .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
                );
            }
        }
    }
    let dest = tempfile::tempdir().unwrap();
    let get = |name| {
        get(name, dest.path(), None, &mut |_, _| ())
            .unwrap_err()
            .to_string()
    };
    assert!(get("fashon_mnist").contains("did you mean \"fashion_mnist\""));
    assert!(get("shakespeare").contains("ships with the program"));
    assert!(names(dest.path()).is_empty());
}
