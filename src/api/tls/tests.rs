use std::os::unix::fs::PermissionsExt as _;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

use super::*;

/// A certificate authority and a directory for what it signs.
pub(in crate::api) struct TestCa {
    pub(in crate::api) dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl TestCa {
    pub(in crate::api) fn new() -> TestCa {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.pem"), &pem).unwrap();
        TestCa { dir, issuer: Issuer::new(params, key), pem }
    }

    pub(in crate::api) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The CA's own certificate, in PEM.
    pub(in crate::api) fn pem(&self) -> &str {
        &self.pem
    }

    /// Writes `name.pem` and `name.key` for both usages, valid for localhost.
    pub(in crate::api) fn issue(&self, name: &str, common_name: &str) {
        let sans = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(sans).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "tests");
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    /// Settings of a server with the certificate `name`.
    pub(in crate::api) fn settings(&self, name: &str) -> TlsSettings {
        TlsSettings {
            cert_file: Some(self.path(&format!("{name}.pem"))),
            key_file: Some(self.path(&format!("{name}.key"))),
            ..TlsSettings::default()
        }
    }
}

fn error(settings: TlsSettings) -> String {
    Tls::load(settings).expect_err("these settings are wrong").to_string()
}

#[test]
fn each_mistake_names_the_flag_or_the_file() {
    let ca = TestCa::new();
    ca.issue("a", "a");
    ca.issue("b", "b");
    let good = ca.settings("a");
    Tls::load(good.clone()).expect("the settings to break");

    let no_key = TlsSettings { key_file: None, ..good.clone() };
    assert!(error(no_key).contains("set --key-file"));
    let no_cert = TlsSettings { cert_file: None, side: Side::Peer, ..good.clone() };
    assert!(error(no_cert).contains("set --peer-cert-file"));
    assert!(error(TlsSettings::default()).contains("--cert-file"));

    let absent = TlsSettings { cert_file: Some(ca.path("none.pem")), ..good.clone() };
    let text = error(absent);
    assert!(text.contains("--cert-file") && text.contains("none.pem"), "{text}");

    let other_key = TlsSettings { key_file: Some(ca.path("b.key")), ..good.clone() };
    let text = error(other_key);
    assert!(text.contains("b.key") && text.contains("is not the key of"), "{text}");

    let swapped = TlsSettings { key_file: Some(ca.path("a.pem")), ..good.clone() };
    assert!(error(swapped).contains("no private key"));
    let swapped = TlsSettings { cert_file: Some(ca.path("a.key")), ..good.clone() };
    assert!(error(swapped).contains("no certificate"));

    fs::write(ca.path("junk"), "-----BEGIN CERTIFICATE-----\n!!!\n").unwrap();
    let junk = TlsSettings { trusted_ca_file: Some(ca.path("junk")), ..good.clone() };
    assert!(error(junk).contains("--trusted-ca-file"));

    let no_ca = TlsSettings { client_cert_auth: true, ..good };
    let text = error(no_ca);
    assert!(text.contains("--client-cert-auth") && text.contains("--trusted-ca-file"), "{text}");
}

#[test]
fn versions_go_from_min_to_max() {
    let names = |min, max| -> Vec<u16> {
        versions(min, max).unwrap().iter().map(|version| u16::from(version.version)).collect()
    };
    let (v12, v13) = (0x0303, 0x0304);
    assert_eq!(names(None, None), [v13, v12]);
    assert_eq!(names(Some(TlsVersion::Tls13), None), [v13]);
    assert_eq!(names(None, Some(TlsVersion::Tls12)), [v12]);
    assert!(matches!(
        versions(Some(TlsVersion::Tls13), Some(TlsVersion::Tls12)),
        Err(TlsError::NoVersion)
    ));
    assert_eq!(TlsVersion::parse("TLS1.2").unwrap(), TlsVersion::Tls12);
    let text = TlsVersion::parse("TLS1.1").unwrap_err().to_string();
    assert_eq!(text, "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)");
}

#[test]
fn suites_are_chosen_by_the_names_of_go() {
    let both = versions(None, None).unwrap();
    let only_13 = versions(Some(TlsVersion::Tls13), None).unwrap();
    let suites = |names: &[&str], versions: &[&'static SupportedProtocolVersion]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        provider(&names, versions).map(|provider| {
            let suites = provider.cipher_suites.iter();
            let old = suites.filter(|suite| suite.tls13().is_none());
            old.map(|suite| suite.suite()).collect::<Vec<_>>()
        })
    };
    assert_eq!(suites(&[], &both).unwrap().len(), 6);
    let wanted = [
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
        "TLS_RSA_WITH_AES_128_CBC_SHA",
        "TLS_AES_128_GCM_SHA256",
    ];
    let mut chosen = suites(&wanted, &both).unwrap();
    chosen.sort_by_key(|suite| u16::from(*suite));
    assert_eq!(
        chosen,
        [
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        ]
    );
    let old = ["TLS_RSA_WITH_AES_128_CBC_SHA"];
    assert!(matches!(suites(&old, &both), Err(TlsError::NoSuite)));
    assert_eq!(suites(&old, &only_13).unwrap(), []);
    let text = suites(&["ECDHE-RSA-AES128-GCM-SHA256"], &both).unwrap_err().to_string();
    assert!(text.contains("ECDHE-RSA-AES128-GCM-SHA256"), "{text}");
    assert!(text.contains("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"), "{text}");
}

#[test]
fn every_suite_of_the_table_exists() {
    let known = ring::default_provider().cipher_suites;
    for (name, suite) in SUITES {
        assert!(known.iter().any(|known| known.suite() == suite), "{name}");
    }
}

#[test]
fn a_certificate_made_once_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let auto = AutoTls {
        dir: dir.path().join("fixtures").join("client"),
        hosts: vec!["127.0.0.1".to_owned(), String::new(), "localhost".to_owned()],
        validity_years: 1,
    };
    let settings = TlsSettings { auto: Some(auto.clone()), ..TlsSettings::default() };
    Tls::load(settings.clone()).unwrap();
    let files = || ["cert.pem", "key.pem"].map(|name| fs::read(auto.dir.join(name)).unwrap());
    let first = files();
    Tls::load(settings.clone()).unwrap();
    assert_eq!(files(), first, "made again although it was there");

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&auto.dir.join("key.pem")), 0o600);
    let left = fs::read_dir(&auto.dir).unwrap().count();
    assert_eq!(left, 2, "something else was left behind");

    // Half of a pair is made anew as a whole.
    fs::remove_file(auto.dir.join("key.pem")).unwrap();
    Tls::load(settings.clone()).unwrap();
    assert_ne!(files(), first);

    let never = AutoTls { validity_years: 0, dir: dir.path().join("other"), ..auto };
    let text = error(TlsSettings { auto: Some(never), ..TlsSettings::default() });
    assert!(text.contains("--self-signed-cert-validity"), "{text}");
}

#[test]
fn the_common_name_is_found_in_a_certificate() {
    let ca = TestCa::new();
    let der = |name: &str| {
        let pem = fs::read(ca.path(&format!("{name}.pem"))).unwrap();
        CertificateDer::from_pem_slice(&pem).unwrap()
    };
    // Long names take the long form of a length.
    let long = "n".repeat(300);
    for (name, common_name) in [("plain", "kube-apiserver"), ("utf8", "Grüße"), ("long", &long)] {
        ca.issue(name, common_name);
        assert_eq!(super::common_name(&der(name)).as_deref(), Some(common_name));
    }
    ca.issue("none", "");
    assert_eq!(super::common_name(&der("none")).unwrap_or_default(), "");
}

#[test]
fn a_damaged_certificate_gives_a_name_or_none_but_never_fails() {
    let ca = TestCa::new();
    ca.issue("a", "someone");
    let pem = fs::read(ca.path("a.pem")).unwrap();
    let der = CertificateDer::from_pem_slice(&pem).unwrap();
    for end in 0..der.len() {
        assert_eq!(super::common_name(&der[..end]), None, "cut at {end}");
    }
    for position in 0..der.len() {
        for value in [0, 0x7f, 0x80, 0x84, 0xff] {
            let mut damaged = der.to_vec();
            damaged[position] = value;
            let _ = super::common_name(&damaged);
        }
    }
}
