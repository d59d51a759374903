use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::record::{PIECE_BYTES, stored_key};
use super::*;

type Records = Vec<(Vec<u8>, Bytes)>;

fn records_between(storage: &dyn Storage, table: Table, from: &[u8], to: &[u8]) -> Records {
    let mut records = Vec::new();
    let scanned = storage.scan(table, from, to, &mut |key, value| {
        records.push((key.to_vec(), value));
        ControlFlow::Continue(())
    });
    scanned.unwrap();
    records
}

fn records(storage: &dyn Storage, table: Table) -> Records {
    records_between(storage, table, b"", b"")
}

fn keys(records: &Records) -> Vec<&[u8]> {
    records.iter().map(|(key, _)| &key[..]).collect()
}

fn put(storage: &mut dyn Storage, key: &[u8], value: impl Into<Bytes>) {
    let mut batch = Batch::new();
    batch.put(Table::Mvcc, key.to_vec(), value);
    storage.write(batch).unwrap();
}

/// Bytes that differ from place to place, so that pieces in the wrong order show.
fn long_value(len: usize, seed: usize) -> Bytes {
    (0..len).map(|at| ((at + seed) * 31 % 251) as u8).collect()
}

/// Runs a test on every storage there is.
fn on_each(test: fn(&mut dyn Storage)) {
    test(&mut MemoryStorage::new());
    test(&mut FaultyDisk::new().open());
    test(&mut FaultyDisk::without_frozen().open());
    let dir = TempDir::new().unwrap();
    test(&mut SledStorage::open(&dir.path().join("checkpoint")).unwrap());
}

/// Runs a test on every storage that outlives the one who has it open.
fn on_each_disk(test: fn(open: &dyn Fn() -> Box<dyn Storage>)) {
    let disk = FaultyDisk::new();
    test(&|| Box::new(disk.open()));
    let dir = TempDir::new().unwrap();
    test(&|| Box::new(SledStorage::open(&checkpoint(&dir)).unwrap()));
}

#[test]
fn what_was_written_is_read() {
    on_each(|storage| {
        put(storage, b"a", "1");
        put(storage, b"b", "2");
        put(storage, b"a", "");
        assert_eq!(storage.get(Table::Mvcc, b"a").unwrap(), Some(Bytes::new()));
        assert_eq!(storage.get(Table::Mvcc, b"b").unwrap(), Some("2".into()));
        assert_eq!(storage.get(Table::Mvcc, b"").unwrap(), None);
        let mut batch = Batch::new();
        batch.delete(Table::Mvcc, "b");
        batch.delete(Table::Mvcc, "never there");
        batch.put(Table::Mvcc, "", "empty key");
        storage.write(batch).unwrap();
        storage.sync().unwrap();
        assert_eq!(
            records(storage, Table::Mvcc),
            [(b"".to_vec(), Bytes::from("empty key")), (b"a".to_vec(), Bytes::new())]
        );
    });
}

#[test]
fn tables_are_apart() {
    on_each(|storage| {
        let all = [
            Table::Head,
            Table::Mvcc,
            Table::Lease,
            Table::Member,
            Table::RemovedMember,
            Table::Alarm,
            Table::Auth,
            Table::User,
            Table::Role,
        ];
        for table in all {
            let mut batch = Batch::new();
            batch.put(table, &b"\xff\xff"[..], format!("{table:?}"));
            batch.put(table, &b""[..], "");
            storage.write(batch).unwrap();
        }
        for table in all {
            let found = records(storage, table);
            assert_eq!(keys(&found), [&b""[..], b"\xff\xff"], "{table:?}");
            assert_eq!(found[1].1, format!("{table:?}"));
        }
    });
}

#[test]
fn a_scan_keeps_to_its_bounds() {
    on_each(|storage| {
        for key in ["a", "b", "b\0", "c"] {
            put(storage, key.as_bytes(), key);
        }
        type Case = (&'static [u8], &'static [u8], &'static [&'static [u8]]);
        let table: [Case; 7] = [
            (b"", b"", &[b"a", b"b", b"b\0", b"c"]),
            (b"b", b"", &[b"b", b"b\0", b"c"]),
            (b"", b"b", &[b"a"]),
            (b"b", b"c", &[b"b", b"b\0"]),
            (b"b", b"b", &[]),
            (b"c", b"a", &[]),
            (b"d", b"", &[]),
        ];
        for (from, to, expected) in table {
            assert_eq!(keys(&records_between(storage, Table::Mvcc, from, to)), expected);
        }
        let mut visited = 0;
        let scanned = storage.scan(Table::Mvcc, b"", b"", &mut |_, _| {
            visited += 1;
            if visited == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        scanned.unwrap();
        assert_eq!(visited, 2);
    });
}

#[test]
fn long_values_come_back_whole() {
    on_each(|storage| {
        let lens = [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 1_500_000, 10];
        for (seed, len) in lens.into_iter().enumerate() {
            // Under one key, so that each replaces the one before it.
            put(storage, b"k", long_value(len, seed));
            assert_eq!(storage.get(Table::Mvcc, b"k").unwrap(), Some(long_value(len, seed)));
        }
        put(storage, b"k\0\0\0\0", long_value(PIECE_BYTES * 3, 1));
        put(storage, b"k", long_value(PIECE_BYTES * 3, 2));
        let found = records(storage, Table::Mvcc);
        assert_eq!(keys(&found), [&b"k"[..], b"k\0\0\0\0"]);
        assert_eq!(found[0].1, long_value(PIECE_BYTES * 3, 2));
        assert_eq!(found[1].1, long_value(PIECE_BYTES * 3, 1));
    });
}

fn frozen(count: usize) -> impl Iterator<Item = (Bytes, Vec<u8>)> {
    (0..count).map(|at| (format!("{at:04}").into(), long_value(at * 10, at).to_vec()))
}

fn put_head(storage: &mut dyn Storage) {
    let mut batch = Batch::new();
    batch.put(Table::Head, "head", "");
    storage.write(batch).unwrap();
}

#[test]
fn frozen_records_are_as_others_but_stay() {
    on_each(|storage| {
        assert_eq!(storage.frozen_to(), None);
        storage.freeze(&mut frozen(500).take(200)).unwrap();
        put_head(storage);
        storage.freeze(&mut frozen(500).skip(200)).unwrap();
        put_head(storage);
        storage.freeze(&mut std::iter::empty()).unwrap();
        storage.sync().unwrap();
        let found = records(storage, Table::Mvcc);
        assert_eq!(found.len(), 500);
        for ((key, value), (expected_key, expected)) in found.iter().zip(frozen(500)) {
            assert!(key[..] == expected_key && value[..] == expected);
        }
        assert_eq!(records_between(storage, Table::Mvcc, b"0100", b"0103").len(), 3);
        assert_eq!(storage.get(Table::Mvcc, b"0007").unwrap(), Some(long_value(70, 7)));
        assert_eq!(storage.get(Table::Mvcc, b"0007x").unwrap(), None);
        assert_eq!(records(storage, Table::Lease).len(), 0);
        let Some(frozen_to) = storage.frozen_to() else { return };
        assert_eq!(frozen_to, "0499");
        let mut batch = Batch::new();
        batch.delete(Table::Mvcc, "0499");
        batch.put(Table::Head, "head", "nothing of it happens");
        assert!(matches!(storage.write(batch), Err(StorageError::Frozen)));
        assert_eq!(storage.get(Table::Head, b"head").unwrap(), Some(Bytes::new()));
    });
}

#[test]
fn frozen_records_come_in_order() {
    on_each(|storage| {
        storage.freeze(&mut frozen(9).skip(5)).unwrap();
        put_head(storage);
        if storage.frozen_to().is_some() {
            let refused = storage.freeze(&mut frozen(7).skip(6));
            assert!(matches!(refused, Err(StorageError::Frozen)), "{refused:?}");
        }
    });
}

/// A crash between the two leaves nothing of the first.
#[test]
fn frozen_records_count_with_the_next_batch() {
    on_each_disk(|open| {
        for (count, counts) in [(10, false), (15, true), (20, false), (17, false), (30, true)] {
            let mut storage = open();
            let before = records(&*storage, Table::Mvcc).len();
            storage.freeze(&mut frozen(count).skip(before)).unwrap();
            if counts {
                put_head(&mut *storage);
                storage.sync().unwrap();
            }
            drop(storage);
            let storage = open();
            let found = records(&*storage, Table::Mvcc);
            let expected = if counts { count } else { before };
            assert_eq!(found.len(), expected);
            assert!(found.iter().zip(frozen(count)).all(|(found, put)| found.0[..] == put.0));
            let last = frozen(expected).last().map(|(key, _)| key);
            assert_eq!(storage.frozen_to(), last);
        }
    });
}

/// As before there was a file for them.
#[test]
fn with_records_that_are_not_frozen_others_are_not_either() {
    on_each(|storage| {
        put(storage, b"0000", "in sled");
        storage.freeze(&mut frozen(9).skip(1)).unwrap();
        storage.sync().unwrap();
        assert_eq!(storage.frozen_to(), None);
        assert_eq!(records(storage, Table::Mvcc).len(), 9);
        let mut batch = Batch::new();
        batch.delete(Table::Mvcc, "0003");
        storage.write(batch).unwrap();
        assert_eq!(records(storage, Table::Mvcc).len(), 8);
    });
}

#[test]
fn damage_to_frozen_records_is_named() {
    let dir = TempDir::new().unwrap();
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    storage.freeze(&mut frozen(20)).unwrap();
    put_head(&mut storage);
    storage.sync().unwrap();
    let before = records(&storage, Table::Mvcc);
    assert_eq!(before.len(), 20);
    drop(storage);
    let path = checkpoint(&dir).join("frozen");
    let file = fs::read(&path).unwrap();
    let read = || -> Result<Records, StorageError> {
        let storage = SledStorage::open(&checkpoint(&dir))?;
        let mut records = Vec::new();
        storage.scan(Table::Mvcc, b"", b"", &mut |key, value| {
            records.push((key.to_vec(), value));
            ControlFlow::Continue(())
        })?;
        Ok(records)
    };
    let is_named = |error: StorageError| {
        assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("ckpt-1"), "{error}");
        assert!(error.to_string().contains("\"frozen\""), "{error}");
    };
    for at in (0..32).chain((32..file.len()).step_by(97)) {
        let mut spoiled = file.clone();
        spoiled[at] ^= 0x80;
        fs::write(&path, spoiled).unwrap();
        is_named(read().expect_err("a byte is another"));
    }
    fs::write(&path, &file[..file.len() - 1]).unwrap();
    is_named(read().expect_err("it is too short"));
    fs::remove_file(&path).unwrap();
    is_named(read().expect_err("it is missing"));
    fs::write(&path, [&file[..], b"what was never written"].concat()).unwrap();
    assert_eq!(read().unwrap(), before);
}

#[test]
fn a_key_that_is_too_long_changes_nothing() {
    on_each(|storage| {
        let mut batch = Batch::new();
        batch.put(Table::User, "a", "1");
        batch.put(Table::User, vec![b'k'; KEY_MAX_BYTES], "2");
        storage.write(batch.clone()).unwrap();
        batch.put(Table::User, "a", "3");
        batch.put(Table::User, vec![b'k'; KEY_MAX_BYTES + 1], "4");
        let error = storage.write(batch).unwrap_err();
        assert!(matches!(error, StorageError::KeyTooLong { table: Table::User, len: 4097 }));
        assert_eq!(storage.get(Table::User, b"a").unwrap(), Some("1".into()));
        put(storage, b"still", "usable");
    });
}

#[test]
fn a_batch_knows_its_size() {
    let mut batch = Batch::new();
    assert!(batch.is_empty() && !batch.is_full());
    batch.put(Table::Mvcc, "key", "value");
    assert_eq!((batch.len(), batch.size_bytes()), (1, 8));
    batch.put(Table::Mvcc, "key", "v");
    assert_eq!((batch.len(), batch.size_bytes()), (1, 4));
    batch.delete(Table::Mvcc, "key");
    batch.delete(Table::Lease, "key");
    assert_eq!((batch.len(), batch.size_bytes()), (2, 6));
    batch.put(Table::Mvcc, "large", vec![0; BATCH_MAX_BYTES]);
    assert!(batch.is_full());
    let mut batch = Batch::new();
    for number in 0..BATCH_MAX_CHANGES {
        assert!(!batch.is_full());
        batch.delete(Table::Mvcc, vec![number as u8]);
    }
    assert!(batch.is_full());
}

#[test]
fn a_power_cut_loses_the_last_writes_but_never_parts_of_one() {
    let disk = FaultyDisk::new();
    let mut storage = disk.open();
    put(&mut storage, b"a", "synced");
    storage.sync().unwrap();
    put(&mut storage, b"b", "1");
    put(&mut storage, b"c", "2");
    put(&mut storage, b"a", "3");
    assert_eq!(disk.unsynced_writes(), 3);
    disk.power_cut(2);
    assert!(matches!(storage.get(Table::Mvcc, b"a"), Err(StorageError::Failed { .. })));
    let mut storage = disk.open();
    assert_eq!(keys(&records(&storage, Table::Mvcc)), [b"a", b"b", b"c"]);
    assert_eq!(storage.get(Table::Mvcc, b"a").unwrap(), Some("synced".into()));
    put(&mut storage, b"d", "4");
    disk.power_cut(0);
    assert_eq!(keys(&records(&disk.open(), Table::Mvcc)), [b"a", b"b", b"c"]);
}

#[test]
fn an_ordered_fault_strikes_once_and_for_all() {
    let disk = FaultyDisk::new();
    let mut storage = disk.open();
    disk.fail_write_after(1);
    put(&mut storage, b"a", "1");
    let mut batch = Batch::new();
    batch.put(Table::Mvcc, "b", "2");
    assert!(matches!(storage.write(batch.clone()), Err(StorageError::Io { .. })));
    assert!(matches!(storage.write(batch), Err(StorageError::Failed { .. })));
    assert!(matches!(storage.sync(), Err(StorageError::Failed { .. })));
    // The write that failed may have got through all the same.
    disk.power_cut(2);
    assert_eq!(keys(&records(&disk.open(), Table::Mvcc)), [b"a", b"b"]);

    let mut storage = disk.open();
    disk.fail_sync_after(0);
    put(&mut storage, b"c", "3");
    assert!(matches!(storage.sync(), Err(StorageError::Io { .. })));
    assert!(matches!(storage.get(Table::Mvcc, b"c"), Err(StorageError::Failed { .. })));
    disk.power_cut(0);
    assert_eq!(keys(&records(&disk.open(), Table::Mvcc)), [b"a", b"b"]);
}

/// Wherever a freeze ends, and the batch after it, there are all of its records or none.
#[test]
fn a_fault_while_records_are_frozen_leaves_all_or_none() {
    for (fails_after, keep) in (0..7).flat_map(|nth| [(nth, 0), (nth, 1)]) {
        let disk = FaultyDisk::new();
        let mut storage = disk.open();
        storage.freeze(&mut frozen(3)).unwrap();
        put_head(&mut storage);
        storage.sync().unwrap();
        // Five records and a batch.
        disk.fail_write_after(fails_after);
        let mut freeze_and_write = || {
            storage.freeze(&mut frozen(8).skip(3))?;
            let mut batch = Batch::new();
            batch.put(Table::Head, "head", "after");
            storage.write(batch)
        };
        assert_eq!(freeze_and_write().is_ok(), fails_after == 6);
        disk.power_cut(keep);
        let mut storage = disk.open();
        let has_batch = storage.get(Table::Head, b"head").unwrap() == Some("after".into());
        // The batch that failed may be on the disk all the same.
        assert_eq!(has_batch, keep == 1 && fails_after >= 5);
        let before = if has_batch { 8 } else { 3 };
        assert_eq!(records(&storage, Table::Mvcc).len(), before);
        // What is left of it is in nobody's way.
        storage.freeze(&mut frozen(9).skip(before)).unwrap();
        put_head(&mut storage);
        let found = records(&storage, Table::Mvcc);
        assert!(found.iter().zip(frozen(9)).all(|(found, put)| found.0[..] == put.0));
        assert_eq!(found.len(), 9);
    }
}

#[test]
fn after_a_full_disk_a_storage_may_be_reopened_unless_a_sync_failed() {
    let disk = FaultyDisk::new();
    let mut storage = disk.open();
    disk.fill_after(2);
    let error = storage.freeze(&mut frozen(3)).unwrap_err();
    assert!(error.is_full() && storage.may_be_reopened());
    disk.power_cut(0);
    let mut storage = disk.open();
    assert_eq!(records(&storage, Table::Mvcc).len(), 0);
    disk.fill_after(9);
    disk.fail_sync_after(0);
    assert!(storage.sync().unwrap_err().is_full() && !storage.may_be_reopened());
}

/// Where a test keeps its checkpoint.
fn checkpoint(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("ckpt-1")
}

#[test]
fn only_the_owner_can_read_a_new_checkpoint() {
    let dir = TempDir::new().unwrap();
    let storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    let mode = fs::metadata(checkpoint(&dir)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let size_bytes = storage.size_on_disk().unwrap();
    assert!((1..100_000).contains(&size_bytes), "an empty checkpoint takes {size_bytes} bytes");
}

#[test]
fn only_one_at_a_time_has_a_checkpoint_open() {
    let dir = TempDir::new().unwrap();
    let first = SledStorage::open(&checkpoint(&dir)).unwrap();
    let error = SledStorage::open(&checkpoint(&dir)).unwrap_err();
    assert!(matches!(error, StorageError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("ckpt-1"), "{error}");
    // Whoever waits gets it when it is free.
    let path = checkpoint(&dir);
    let waiting = std::thread::spawn(move || SledStorage::open(&path).map(|_| ()));
    drop(first);
    waiting.join().unwrap().unwrap();
}

#[test]
fn another_database_is_refused() {
    let dir = TempDir::new().unwrap();
    let other = sled::Config::new().path(checkpoint(&dir)).open().unwrap();
    other.insert("key", "value").unwrap();
    drop(other);
    let error = SledStorage::open(&checkpoint(&dir)).unwrap_err();
    assert!(matches!(error, StorageError::Foreign { .. }), "{error}");
    assert!(!checkpoint(&dir).join("synced").exists(), "nothing is added to it");

    let dir = TempDir::new().unwrap();
    drop(SledStorage::open(&checkpoint(&dir)).unwrap());
    with_sled(&checkpoint(&dir), |db| {
        db.clear().unwrap();
        db.insert("key", "value").unwrap();
    });
    let error = SledStorage::open(&checkpoint(&dir)).unwrap_err();
    assert!(matches!(error, StorageError::Foreign { .. }), "{error}");
}

#[test]
fn a_newer_format_is_refused() {
    let dir = TempDir::new().unwrap();
    drop(SledStorage::open(&checkpoint(&dir)).unwrap());
    with_sled(&checkpoint(&dir), |db| {
        let key = stored_key(super::record::OWN_TABLE, b"format");
        let format = [&b"kvorum checkpoint "[..], &7_u32.to_le_bytes()].concat();
        let sealed = super::record::encode_head(&key, &super::record::Head::Whole(&format));
        db.insert(key, sealed).unwrap();
    });
    let error = SledStorage::open(&checkpoint(&dir)).unwrap_err();
    assert!(matches!(error, StorageError::NewerFormat { found: 7, known: 2, .. }), "{error}");
}

/// Changes a checkpoint behind its back.
fn with_sled(path: &Path, change: impl FnOnce(&sled::Db)) {
    let patience = Instant::now() + Duration::from_secs(5);
    let db = loop {
        let config = sled::Config::new().path(path).segment_size(4 << 20);
        match config.open() {
            Ok(db) => break db,
            // The one who had it open may still be letting go.
            Err(error) => assert!(Instant::now() < patience, "{error}"),
        }
    };
    change(&db);
    db.flush().unwrap();
}

#[test]
fn a_damaged_record_is_found_and_named() {
    type Damage = fn(&sled::Db);
    // (what to do, the record damaged by it, what the error says)
    let table: [(Damage, &[u8], &str); 6] = [
        (|db| flip_last(db, b"\x02short"), b"short", "table 2, key short"),
        (|db| flip_last(db, b"\x02long"), b"long", "table 2, key long"),
        (|db| flip_last(db, b"\xff\x02long\0\0\0\x01"), b"long", "key long, piece 1"),
        (|db| remove(db, b"\xff\x02long\0\0\0\x02"), b"long", "key long, piece 2"),
        (
            // The right value under the wrong key.
            |db| {
                let value = db.get(b"\x02other").unwrap().unwrap();
                db.insert(b"\x02short", value).unwrap();
            },
            b"short",
            "table 2, key short",
        ),
        (
            |db| {
                db.insert(b"\x02short", "").unwrap();
            },
            b"short",
            "table 2, key short",
        ),
    ];
    for (damage, key, says) in table {
        let dir = TempDir::new().unwrap();
        let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
        put(&mut storage, b"short", "value");
        put(&mut storage, b"other", "thing");
        put(&mut storage, b"long", long_value(3 * PIECE_BYTES, 0));
        drop(storage);
        with_sled(&checkpoint(&dir), damage);
        let storage = SledStorage::open(&checkpoint(&dir)).unwrap();
        for error in [
            storage.get(Table::Mvcc, key).unwrap_err(),
            storage.scan(Table::Mvcc, b"", b"", &mut |_, _| ControlFlow::Continue(())).unwrap_err(),
        ] {
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(says), "{error}");
            assert!(error.to_string().contains("ckpt-1"), "{error}");
        }
        assert_eq!(storage.get(Table::Mvcc, b"other").unwrap(), Some("thing".into()));
    }
}

fn flip_last(db: &sled::Db, key: &[u8]) {
    let mut value = db.get(key).unwrap().unwrap().to_vec();
    *value.last_mut().unwrap() ^= 1;
    db.insert(key, value).unwrap();
}

fn remove(db: &sled::Db, key: &[u8]) {
    assert!(db.remove(key).unwrap().is_some());
}

#[test]
fn a_lost_record_is_missed() {
    let dir = TempDir::new().unwrap();
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    for key in [b"a", b"b", b"c"] {
        put(&mut storage, key, "value");
    }
    drop(storage);
    with_sled(&checkpoint(&dir), |db| remove(db, b"\x02b"));
    let storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    let mut on = |_: &[u8], _| ControlFlow::Continue(());
    let error = storage.scan(Table::Mvcc, b"", b"", &mut on).unwrap_err();
    assert!(error.to_string().contains("2 records of 3 written"), "{error}");
    storage.scan(Table::Lease, b"", b"", &mut on).unwrap();
}

#[test]
fn an_older_state_is_not_taken_for_the_newest() {
    let dir = TempDir::new().unwrap();
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    put(&mut storage, b"a", "value");
    storage.sync().unwrap();
    drop(storage);
    let old = TempDir::new().unwrap();
    copy_checkpoint(&checkpoint(&dir), &checkpoint(&old));
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    put(&mut storage, b"b", "value");
    put(&mut storage, b"c", "not synced");
    storage.sync().unwrap();
    drop(storage);
    let mark = fs::read(checkpoint(&dir).join("synced")).unwrap();
    fs::write(checkpoint(&old).join("synced"), &mark).unwrap();
    let error = SledStorage::open(&checkpoint(&old)).unwrap_err();
    assert!(error.to_string().contains("only 2 of 4 writes are left"), "{error}");
    // Losing everything is no new beginning either.
    fs::remove_file(checkpoint(&old).join("db")).unwrap();
    for entry in fs::read_dir(checkpoint(&old)).unwrap().map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with("snap") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    let error = SledStorage::open(&checkpoint(&old)).unwrap_err();
    assert!(error.to_string().contains("only 0 of 4 writes are left"), "{error}");
    // Of the mark's two slots one is enough; without any nothing can be told.
    let spoil = |at: &[usize]| {
        let mut spoiled = mark.clone();
        at.iter().for_each(|at| spoiled[*at] ^= 1);
        fs::write(checkpoint(&dir).join("synced"), &spoiled).unwrap();
        SledStorage::open(&checkpoint(&dir)).map(|_| ())
    };
    spoil(&[0]).unwrap();
    spoil(&[4096]).unwrap();
    let error = spoil(&[0, 4096]).unwrap_err();
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
}

#[test]
fn a_file_full_of_garbage_never_reads_as_something_else() {
    let dir = TempDir::new().unwrap();
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    for number in 0..400_u32 {
        put(&mut storage, &number.to_be_bytes(), long_value(500, number as usize));
    }
    storage.sync().unwrap();
    drop(storage);
    let file = checkpoint(&dir).join("db");
    let intact = fs::read(&file).unwrap();
    for part in 1..8 {
        let mut damaged = intact.clone();
        let at = intact.len() * part / 8;
        damaged[at..at + 64].fill(0xa5);
        let copy = TempDir::new().unwrap();
        copy_checkpoint(&checkpoint(&dir), &checkpoint(&copy));
        fs::write(checkpoint(&copy).join("db"), damaged).unwrap();
        // It may be found on opening or on reading, or have hit nothing that matters.
        let Ok(storage) = SledStorage::open(&checkpoint(&copy)) else { continue };
        let mut found = 0;
        let scanned = storage.scan(Table::Mvcc, b"", b"", &mut |key, value| {
            let number = u32::from_be_bytes(key.try_into().unwrap());
            assert_eq!(value, long_value(500, number as usize));
            found += 1;
            ControlFlow::Continue(())
        });
        assert!(scanned.is_err() || found == 400, "{found} of 400 and no error");
    }
}

fn copy_checkpoint(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("blobs")).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn sled_keeps_all_pages_in_its_file() {
    // Entries as large as they get, in an order that fills pages to the brim.
    let dir = TempDir::new().unwrap();
    let mut storage = SledStorage::open(&checkpoint(&dir)).unwrap();
    for number in 0..300_usize {
        let mut key = vec![b'k'; KEY_MAX_BYTES];
        key[..2].copy_from_slice(&((number * 7919) as u16).to_be_bytes());
        put(&mut storage, &key, long_value(PIECE_BYTES, number));
        if number % 20 == 0 {
            storage.sync().unwrap();
        }
    }
    storage.sync().unwrap();
    assert_eq!(records(&storage, Table::Mvcc).len(), 300);
}

#[derive(Debug, Clone)]
enum Step {
    /// Keys, and the length and seed of their values; `None` deletes.
    Write(Vec<(u8, Option<(usize, usize)>)>),
    Sync,
    Reopen,
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![4 => 0..100_usize, 1 => PIECE_BYTES - 2..4 * PIECE_BYTES];
    let change = (0..20_u8, prop::option::weighted(0.8, (len, 0..250_usize)));
    let step = prop_oneof![
        6 => prop::collection::vec(change, 0..12).prop_map(Step::Write),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn batches_do_what_they_do_to_a_map(steps in any_steps()) {
        let dir = TempDir::new().unwrap();
        let disk = FaultyDisk::new();
        let open = || -> Vec<Box<dyn Storage>> {
            let sled = SledStorage::open(&checkpoint(&dir)).unwrap();
            vec![Box::new(sled), Box::new(disk.open())]
        };
        let mut storages = open();
        let mut map: BTreeMap<Vec<u8>, Bytes> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Write(changes) => {
                    let mut batch = Batch::new();
                    for (key, value) in changes {
                        let key = vec![key];
                        match value {
                            Some((len, seed)) => {
                                let value = long_value(len, seed);
                                batch.put(Table::Lease, key.clone(), value.clone());
                                map.insert(key, value);
                            }
                            None => {
                                batch.delete(Table::Lease, key.clone());
                                map.remove(&key);
                            }
                        }
                    }
                    for storage in &mut storages {
                        storage.write(batch.clone()).unwrap();
                    }
                }
                Step::Sync => storages.iter_mut().for_each(|storage| storage.sync().unwrap()),
                Step::Reopen => {
                    storages.clear();
                    storages = open();
                }
            }
            for storage in &storages {
                let expected: Records =
                    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
                prop_assert_eq!(records(&**storage, Table::Lease), expected);
                for key in 0..20 {
                    let value = storage.get(Table::Lease, &[key]).unwrap();
                    prop_assert_eq!(value.as_ref(), map.get(&[key][..]));
                }
            }
        }
        // Nothing is left behind: not a piece more than the values need.
        drop(storages);
        let pieces: usize = map
            .values()
            .filter(|value| value.len() > PIECE_BYTES)
            .map(|value| value.len().div_ceil(PIECE_BYTES))
            .sum();
        with_sled(&checkpoint(&dir), |db| assert_eq!(db.scan_prefix([255]).count(), pieces));
    }
}
