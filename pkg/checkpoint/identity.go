package checkpoint

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// Identity is what stays the same between a stopped container and its
// successor. Namespace is the Kubernetes namespace, Key the annotation's value
// or the pod's UID, Container the container's name in the pod.
type Identity struct {
	Namespace string `json:"namespace"`
	Key       string `json:"key"`
	Container string `json:"container"`
}

// String is "namespace/key/container".
func (i Identity) String() string { return i.Namespace + "/" + i.Key + "/" + i.Container }

// Validate checks that no part is empty, longer than 253 bytes or holds a
// slash or a control character.
func (i Identity) Validate() error {
	for name, v := range map[string]string{"namespace": i.Namespace, "key": i.Key, "container": i.Container} {
		if v == "" || len(v) > 253 {
			return fmt.Errorf("identity: %s of %d bytes: %w", name, len(v), ErrInvalid)
		}
		if strings.ContainsFunc(v, func(r rune) bool { return r == '/' || r < ' ' || r == 0x7f }) {
			return fmt.Errorf("identity: %s %q holds a slash or control character: %w", name, v, ErrInvalid)
		}
	}
	return nil
}

// Hash is 16 hex digits of a SHA-256 over the parts; it is the directory under
// which the checkpoints of this identity lie.
func (i Identity) Hash() string {
	h := sha256.New()
	for _, p := range []string{i.Namespace, i.Key, i.Container} {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// ID names one checkpoint: identity hash, time of the dump (UTC), 8 random hex
// digits, as in "0123456789abcdef-20260102T150405-89abcdef". IDs of one
// identity sort by time.
type ID string

const idTime = "20060102T150405"

// NewID makes an ID for a dump of the identity begun at t.
func NewID(i Identity, t time.Time) ID {
	var b [4]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return ID(i.Hash() + "-" + t.UTC().Format(idTime) + "-" + hex.EncodeToString(b[:]))
}

// ParseID checks that s has the form of an ID. The error wraps [ErrInvalid].
func ParseID(s string) (ID, error) {
	if len(s) == 16+1+15+1+8 && s[16] == '-' && s[32] == '-' && isHex(s[:16]) && isHex(s[33:]) {
		if _, err := time.Parse(idTime, s[17:32]); err == nil {
			return ID(s), nil
		}
	}
	if len(s) > 64 {
		s = s[:64] + "..."
	}
	return "", fmt.Errorf("checkpoint id %q: %w", s, ErrInvalid)
}

// IdentityHash is the part of the ID that equals [Identity.Hash].
func (id ID) IdentityHash() string { return string(id[:16]) }

func isHex(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
