package checkpoint_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestIdentity(t *testing.T) {
	i := checkpoint.Identity{Namespace: "default", Key: "db-0", Container: "app"}
	if got := i.String(); got != "default/db-0/app" {
		t.Errorf("string %q", got)
	}
	// The hash is on disk: it must not change.
	if got := i.Hash(); got != "40c456a89e569a3c" {
		t.Errorf("hash %s", got)
	}
	seen := map[string]checkpoint.Identity{}
	for _, i := range []checkpoint.Identity{i, {"a", "b", "c"}, {"ab", "", "c"}, {"a", "bc", ""}, {"", "ab", "c"}, {"a", "c", "b"}, {"1:a,", "b", "c"}, {"a,1:b", "", "c"}} {
		if other, ok := seen[i.Hash()]; ok {
			t.Errorf("%q and %q have one hash", i, other)
		}
		seen[i.Hash()] = i
	}
	for _, test := range []struct {
		i  checkpoint.Identity
		ok bool
	}{
		{i, true},
		{checkpoint.Identity{Namespace: strings.Repeat("n", 253), Key: "ü ~", Container: "c"}, true},
		{checkpoint.Identity{}, false},
		{checkpoint.Identity{Key: "k", Container: "c"}, false},
		{checkpoint.Identity{Namespace: "n", Container: "c"}, false},
		{checkpoint.Identity{Namespace: "n", Key: "k"}, false},
		{checkpoint.Identity{Namespace: strings.Repeat("n", 254), Key: "k", Container: "c"}, false},
		{checkpoint.Identity{Namespace: "n", Key: "a/b", Container: "c"}, false},
		{checkpoint.Identity{Namespace: "n", Key: "k", Container: "c\n"}, false},
		{checkpoint.Identity{Namespace: "n", Key: "k", Container: "c\x7f"}, false},
		{checkpoint.Identity{Namespace: "n\x00", Key: "k", Container: "c"}, false},
	} {
		err := test.i.Validate()
		if (err == nil) != test.ok || err != nil && !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("%q: %v", test.i, err)
		}
	}
}

func TestNewID(t *testing.T) {
	i := checkpoint.Identity{Namespace: "n", Key: "k", Container: "c"}
	at := time.Date(2026, 1, 2, 23, 4, 5, 999, time.FixedZone("", 3600))
	id := checkpoint.NewID(i, at)
	if !strings.HasPrefix(string(id), i.Hash()+"-20260102T220405-") || id.IdentityHash() != i.Hash() {
		t.Errorf("id %s", id)
	}
	if got, err := checkpoint.ParseID(string(id)); got != id || err != nil {
		t.Errorf("parsed %s, %v", got, err)
	}
	if id == checkpoint.NewID(i, at) {
		t.Error("two IDs are equal")
	}
	var ids []checkpoint.ID
	for n := range 100 {
		ids = append(ids, checkpoint.NewID(i, at.Add(time.Duration(n)*13*time.Hour)))
	}
	if !slices.IsSorted(ids) {
		t.Error("IDs do not sort by time")
	}
}

func TestParseID(t *testing.T) {
	good := "0123456789abcdef-20260102T150405-89abcdef"
	if id, err := checkpoint.ParseID(good); err != nil || string(id) != good || id.IdentityHash() != "0123456789abcdef" {
		t.Errorf("%s, %v", id, err)
	}
	for _, bad := range []string{
		"", "x", good[1:], good + "0", strings.ToUpper(good), strings.Replace(good, "T", "t", 1), strings.Replace(good, "2026", "20x6", 1),
		"0123456789abcdef-20261302T150405-89abcdef", "0123456789abcdef-20260230T150405-89abcdef", "0123456789abcdef-20260102T250405-89abcdef",
		"0123456789abcdef/20260102T150405/89abcdef", "../../../../../..-20260102T150405-89abcdef", "0123456789abcdeg-20260102T150405-89abcdef",
		"0123456789abcdef-20260102T150405-89abcde\n", "0123456789abcdef-20260102T150405-89abcde\x00", strings.Repeat("a", 1<<20),
	} {
		id, err := checkpoint.ParseID(bad)
		if id != "" || !errors.Is(err, checkpoint.ErrInvalid) || len(err.Error()) > 400 {
			t.Errorf("%.100q: %s, %.400v", bad, id, err)
		}
	}
}

// FuzzParseID: what is accepted is one harmless element of a path.
func FuzzParseID(f *testing.F) {
	f.Add("0123456789abcdef-20260102T150405-89abcdef")
	f.Add("../../../../../..-20260102T150405-89abcdef")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := checkpoint.ParseID(s)
		if err != nil {
			if id != "" || !errors.Is(err, checkpoint.ErrInvalid) {
				t.Errorf("%q, %v", id, err)
			}
			return
		}
		if string(id) != s || len(id) != 41 || strings.Trim(s, "0123456789abcdefT-") != "" || len(id.IdentityHash()) != 16 {
			t.Errorf("accepted %q", s)
		}
	})
}
