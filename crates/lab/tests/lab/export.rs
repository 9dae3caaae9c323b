use std::fs::{self, File};

use anyformer_lab::export::{Part, write_all, write_csv, write_parquet};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, RowAccessor};

use crate::fixture::records;

#[test]
fn both_forms_read_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut records = records();
    records[0].key.seed = u64::MAX;
    records[1].result.as_mut().unwrap().machine = "a \"quoted\", machine\nwith µ".into();
    records[2].result.as_mut().unwrap().loss = f64::NAN;
    assert_eq!(write_all(folder.path(), &records).unwrap().len(), 6);
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        6,
        "no temporary file is left"
    );

    let mut reader = csv::Reader::from_path(folder.path().join("trials.csv")).unwrap();
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap();
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let parquet =
        SerializedFileReader::new(File::open(folder.path().join("trials.parquet")).unwrap())
            .unwrap();
    let columns: Vec<_> = parquet
        .get_row_iter(None)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!((rows.len(), columns.len()), (records.len(), records.len()));
    for ((record, row), column) in records.iter().zip(&rows).zip(&columns) {
        assert_eq!(row[at("id")], *record.id.as_str());
        assert_eq!(column.get_string(at("id")).unwrap(), record.id.as_str());
        assert_eq!(row[at("seed")].parse::<u64>().unwrap(), record.key.seed);
        assert_eq!(column.get_ulong(at("seed")).unwrap(), record.key.seed);
        let field = column.get_column_iter().nth(at("loss")).unwrap().1;
        match &record.result {
            Some(result) => {
                assert_eq!(
                    row[at("loss")].parse::<f64>().unwrap().to_bits(),
                    result.loss.to_bits()
                );
                assert!(
                    matches!(field, Field::Double(value) if value.to_bits() == result.loss.to_bits())
                );
                assert_eq!(row[at("machine")], result.machine);
                assert_eq!(column.get_string(at("machine")).unwrap(), &result.machine);
            }
            None => {
                assert_eq!(&row[at("loss")], "");
                assert_eq!(field, &Field::Null);
                assert_eq!(Some(row[at("error")].to_string()), record.error);
            }
        }
    }
    let curves =
        SerializedFileReader::new(File::open(folder.path().join("curves.parquet")).unwrap())
            .unwrap();
    let points: usize = records
        .iter()
        .flat_map(|record| &record.result)
        .map(|result| result.curve.len())
        .sum();
    assert_eq!(curves.metadata().file_metadata().num_rows(), points as i64);
    let lines = csv::Reader::from_path(folder.path().join("latency.csv"))
        .unwrap()
        .into_records()
        .count();
    assert_eq!(
        lines,
        records
            .iter()
            .flat_map(|record| &record.result)
            .map(|result| result.latency.len())
            .sum::<usize>()
    );
}

#[test]
fn nothing_to_export_is_an_empty_table_and_a_bad_path_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.parquet");
    write_parquet(&path, Part::Trials, &[]).unwrap();
    let reader = SerializedFileReader::new(File::open(&path).unwrap()).unwrap();
    assert_eq!(reader.metadata().file_metadata().num_rows(), 0);
    let error = write_csv(
        &folder.path().join("none/trials.csv"),
        Part::Trials,
        &records(),
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("export the trials to"),
        "{error}"
    );
}
