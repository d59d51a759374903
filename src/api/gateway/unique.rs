//! No field of a message is in its JSON twice.
//!
//! prost-reflect takes the last of two; etcd refuses the body, as the JSON of protocol
//! buffers demands. A field has two names there, `range_end` and `rangeEnd`. What is unknown
//! is ignored, and may be there any number of times.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use prost_reflect::{Kind, MessageDescriptor};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Reads JSON for a message and fails on a field that is there twice. All else it takes: it
/// is checked when the message is made.
pub(super) struct Unique {
    pub(super) message: MessageDescriptor,
}

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = ();

    fn expecting(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        text.write_str("JSON")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<(), M::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = fields.next_key::<Cow<'_, str>>()? {
            let message = &self.message;
            let field =
                message.get_field_by_json_name(&name).or_else(|| message.get_field_by_name(&name));
            if let Some(field) = &field
                && !seen.insert(field.number())
            {
                return Err(M::Error::custom(format!("duplicate field {name:?}")));
            }
            match field.filter(|field| !field.is_map()).map(|field| field.kind()) {
                Some(Kind::Message(message)) => fields.next_value_seed(Unique { message })?,
                _ => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut values: S) -> Result<(), S::Error> {
        while values.next_element_seed(Unique { message: self.message.clone() })?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}
