package store

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

func TestGC(t *testing.T) {
	size := int64(0)
	for _, data := range content(checkpoint.NewID(alice, noon)) {
		size += int64(len(data))
	}
	for name, test := range map[string]struct {
		policy Policy
		want   []string // in the order of removal within a rank
	}{
		"nothing":             {Policy{}, nil},
		"generous":            {Policy{TTL: 1000 * time.Hour, MaxCount: 100, MaxBytes: 1 << 40, KeepPerIdentity: 10}, nil},
		"ttl":                 {Policy{TTL: time.Hour + 30*time.Minute}, []string{"alice old", "quarantined"}},
		"per identity":        {Policy{KeepPerIdentity: 1}, []string{"alice old"}},
		"count: 1 too many":   {Policy{MaxCount: 4}, []string{"quarantined"}},
		"count: 2 too many":   {Policy{MaxCount: 3}, []string{"quarantined", "corrupt"}},
		"count: 3 too many":   {Policy{MaxCount: 2}, []string{"quarantined", "corrupt", "alice old"}},
		"count: 4 too many":   {Policy{MaxCount: 1}, []string{"quarantined", "corrupt", "alice old", "bob"}},
		"bytes: 1 too many":   {Policy{MaxBytes: 5*size - 1}, []string{"quarantined"}},
		"bytes: enough":       {Policy{MaxBytes: 6 * size}, nil},
		"bytes: none allowed": {Policy{MaxBytes: 1}, []string{"quarantined", "corrupt", "alice old", "bob", "alice new"}},
		"dead pod":            {Policy{DeadPodUIDs: func(uid string) bool { return uid == "bob" }}, []string{"bob"}},
		"all pods dead":       {Policy{DeadPodUIDs: func(string) bool { return true }}, []string{"bob"}}, // the others have a key
		"both":                {Policy{KeepPerIdentity: 1, MaxCount: 3}, []string{"alice old", "quarantined"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(fsys.NewMem(), "/s")
			must(t, err)
			ctx := t.Context()
			ids := map[string]checkpoint.ID{}
			add := func(name string, i checkpoint.Identity, ago time.Duration, pod string) {
				m := manifestFor(i, 0)
				m.CreatedAt = time.Now().UTC().Add(-ago)
				m.ID, m.PodUID = checkpoint.NewID(i, m.CreatedAt), pod
				must(t, commit(ctx, s, m))
				ids[name] = m.ID
			}
			carol := checkpoint.Identity{Namespace: "n", Key: "carol", Container: "c"}
			add("alice new", alice, time.Minute, "uid")
			add("alice old", alice, 2*time.Hour, "uid")
			add("bob", bob, 30*time.Minute, "bob")
			add("claimed", carol, 50*time.Hour, "carol")
			_, err = s.Claim(ctx, ids["claimed"], "c")
			must(t, err)
			add("quarantined", carol, 3*time.Hour, "uid")
			must(t, s.Quarantine(ctx, ids["quarantined"], "x", nil))
			add("corrupt", carol, time.Hour, "uid")
			must(t, s.fs.Remove(filepath.Join(s.committedPath(ids["corrupt"]), checkpoint.ManifestFile)))

			names := func(removals []Removal) (names []string) {
				for _, r := range removals {
					for name, id := range ids {
						if id == r.ID {
							names = append(names, name)
						}
					}
					if r.Reason == "" || r.SizeBytes != size {
						t.Errorf("removal %+v, want %d bytes and a reason", r, size)
					}
				}
				return names
			}
			dry, err := s.GC(ctx, test.policy, true)
			must(t, err)
			records, err := s.List(ctx)
			must(t, err)
			if len(records) != 6 {
				t.Fatalf("dry run left %d", len(records))
			}
			wet, err := s.GC(ctx, test.policy, false)
			must(t, err)
			got := names(wet)
			if !slices.Equal(got, names(dry)) {
				t.Errorf("dry run %v, then %v", names(dry), got)
			}
			if name == "ttl" {
				slices.Sort(got)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("removed %q, want %q", got, test.want)
			}
			records, err = s.List(ctx)
			must(t, err)
			for _, r := range records {
				for name, id := range ids {
					if id == r.ID && slices.Contains(test.want, name) {
						t.Errorf("%s is still there", name)
					}
				}
			}
			if len(records) != 6-len(test.want) {
				t.Errorf("%d left", len(records))
			}
			tidy(t, s)
		})
	}
}

// TestGCGoesOn: what cannot be removed does not keep the rest.
func TestGCGoesOn(t *testing.T) {
	s := openOS(t)
	ctx := t.Context()
	for n := range 4 {
		mustCommit(t, s, alice, n)
	}
	// A stranger's trash that is not a directory goes as well.
	must(t, os.WriteFile(s.path(trashPrefix+"x"), nil, 0o600))
	got, err := s.GC(ctx, Policy{KeepPerIdentity: 1}, false)
	if err != nil || len(got) != 3 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := os.Lstat(s.path(trashPrefix + "x")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
