//! The common name of a certificate's subject.
//!
//! etcd takes the user of a client from there. The certificate has been verified when
//! this is asked, so all that is needed is the walk to one field:
//!
//! ```text
//! Certificate ─ TBSCertificate ─ [version] serial algorithm issuer validity SUBJECT …
//! SUBJECT = SEQUENCE of SET of SEQUENCE { 2.5.4.3, string }
//! ```
//!
//! DER that does not look like this gives no name; nothing here can fail otherwise.

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const INTEGER: u8 = 0x02;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// The optional version of a certificate, explicitly tagged.
const VERSION: u8 = 0xa0;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
/// 2.5.4.3, encoded.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// The subject's common name: the last one when there are several, as Go takes it.
/// `None` when there is none, or in a string type nobody uses any more.
pub(crate) fn common_name(certificate: &[u8]) -> Option<String> {
    let mut outer = Der(certificate);
    let mut certificate = Der(outer.expect(SEQUENCE)?);
    let mut tbs = Der(certificate.expect(SEQUENCE)?);
    let (tag, _) = tbs.next()?;
    if tag == VERSION {
        tbs.expect(INTEGER)?;
    }
    // Algorithm, issuer and validity.
    for _ in 0..3 {
        tbs.expect(SEQUENCE)?;
    }
    let mut found = None;
    let mut subject = Der(tbs.expect(SEQUENCE)?);
    while let Some((SET, set)) = subject.next() {
        let mut set = Der(set);
        while let Some((SEQUENCE, attribute)) = set.next() {
            let mut attribute = Der(attribute);
            if attribute.expect(OBJECT_IDENTIFIER)? != COMMON_NAME {
                continue;
            }
            let (tag, value) = attribute.next()?;
            if matches!(tag, UTF8_STRING | PRINTABLE_STRING | IA5_STRING) {
                found = std::str::from_utf8(value).ok().map(str::to_owned);
            }
        }
    }
    found
}

/// What is left to read of some DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next element: its tag and its content.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = if first < 0x80 {
            (usize::from(first), rest)
        } else {
            // The long form: the number of bytes that hold the length. Four are enough for
            // any certificate, and the length then fits.
            let bytes = usize::from(first & 0x7f);
            if bytes == 0 || bytes > 4 {
                return None;
            }
            let (digits, rest) = rest.split_at_checked(bytes)?;
            let length = digits.iter().fold(0_usize, |sum, &digit| (sum << 8) | usize::from(digit));
            (length, rest)
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, content))
    }

    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, _)| *found == tag).map(|(_, content)| content)
    }
}
