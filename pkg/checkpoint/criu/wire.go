package criu

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Fields that CRIU 4.2 writes and go-criu v7.2.0 does not know are read from a
// message's unknown fields. The bytes there have been parsed once, so they are
// well formed; an error ends the search all the same.

// unknown calls f with every occurrence of a field.
func unknown(m proto.Message, field protowire.Number, f func(protowire.Type, []byte)) {
	b := m.ProtoReflect().GetUnknown()
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return
		}
		b = b[n:]
		n = protowire.ConsumeFieldValue(num, typ, b)
		if n < 0 {
			return
		}
		if num == field {
			f(typ, b[:n])
		}
		b = b[n:]
	}
}

// unknownUint is the last value of a scalar field; ok is false without one.
func unknownUint(m proto.Message, field protowire.Number) (v uint64, ok bool) {
	unknown(m, field, func(t protowire.Type, b []byte) {
		if t != protowire.VarintType {
			return
		}
		if u, n := protowire.ConsumeVarint(b); n > 0 {
			v, ok = u, true
		}
	})
	return v, ok
}

// unknownUints is a repeated scalar field, packed or not.
func unknownUints(m proto.Message, field protowire.Number) []uint32 {
	var vs []uint32
	unknown(m, field, func(t protowire.Type, b []byte) {
		switch t {
		case protowire.VarintType:
			if u, n := protowire.ConsumeVarint(b); n > 0 {
				vs = append(vs, uint32(u))
			}
		case protowire.BytesType:
			packed, _ := protowire.ConsumeBytes(b)
			for len(packed) > 0 {
				u, n := protowire.ConsumeVarint(packed)
				if n < 0 {
					return
				}
				vs = append(vs, uint32(u))
				packed = packed[n:]
			}
		}
	})
	return vs
}

// unknownBytes is the last value of a string, bytes or message field.
func unknownBytes(m proto.Message, field protowire.Number) (v []byte, ok bool) {
	unknown(m, field, func(t protowire.Type, b []byte) {
		if t == protowire.BytesType {
			if u, n := protowire.ConsumeBytes(b); n > 0 {
				v, ok = u, true
			}
		}
	})
	return v, ok
}
