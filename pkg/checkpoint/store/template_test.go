package store

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// mustTemplate commits a version of a template, made n seconds after noon.
func mustTemplate(t testing.TB, s *Store, i checkpoint.Identity, name string, n int) TemplateRef {
	t.Helper()
	m := manifestFor(i, n)
	m.Template = name
	must(t, commit(t.Context(), s, m))
	return TemplateRef{i.Namespace, name, m.ID}
}

// TestTemplate walks a template through its life.
func TestTemplate(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		_, err := s.LatestTemplate(ctx, "default", shop)
		wantIs(t, err, checkpoint.ErrNotFound)
		v1 := mustTemplate(t, s, bob, shop, 1)
		mustTemplate(t, s, checkpoint.Identity{Namespace: "other", Key: "k", Container: "c"}, shop, 9)
		pin, err := s.PinTemplate(ctx, v1, "one")
		must(t, err)
		second, err := s.PinTemplate(ctx, v1, "two")
		must(t, err)
		must(t, pin.Verify(ctx, nil))
		if pin.ID() != v1.Version || pin.Manifest().Template != shop {
			t.Errorf("pinned %s of %q", pin.ID(), pin.Manifest().Template)
		}
		wantIs(t, s.RemoveTemplate(ctx, v1), checkpoint.ErrBusy)

		v2 := mustTemplate(t, s, alice, shop, 2)
		m, err := s.LatestTemplate(ctx, "default", shop)
		must(t, err)
		if m.ID != v2.Version {
			t.Errorf("latest is %s, want %s", m.ID, v2.Version)
		}
		if removed, err := s.PruneTemplates(ctx); err != nil || len(removed) != 0 {
			t.Errorf("pruned %v, %v although it is pinned", removed, err)
		}
		must(t, pin.Consume(ctx))
		wantIs(t, pin.Release(ctx), checkpoint.ErrNotFound)
		wantIs(t, s.RemoveTemplate(ctx, v1), checkpoint.ErrBusy)
		must(t, second.Release(ctx))

		// Templates are no checkpoints: GC and List know nothing of them.
		if removed, err := s.GC(ctx, Policy{TTL: 1, MaxCount: 1, MaxBytes: 1}, false); err != nil || len(removed) != 0 {
			t.Errorf("gc removed %v, %v", removed, err)
		}
		if records, err := s.List(ctx); err != nil || len(records) != 0 {
			t.Errorf("list %v, %v", records, err)
		}
		_, err = s.Claim(ctx, v2.Version, "c")
		wantIs(t, err, checkpoint.ErrNotFound)

		if removed, err := s.PruneTemplates(ctx); err != nil || len(removed) != 1 || removed[0] != v1 {
			t.Errorf("pruned %v, %v, want %v", removed, err, v1)
		}
		all, err := s.Templates(ctx)
		if err != nil || len(all) != 2 || all[0].TemplateRef != v2 || !all[0].Newest || all[1].Namespace != "other" {
			t.Errorf("templates %+v, %v", all, err)
		}
		must(t, s.RemoveTemplate(ctx, v2))
		wantIs(t, s.RemoveTemplate(ctx, v2), checkpoint.ErrNotFound)
		_, err = s.PinTemplate(ctx, v2, "c")
		wantIs(t, err, checkpoint.ErrNotFound)
	})
}

// TestTemplatePinOfTheDead: a process that died keeps nothing.
func TestTemplatePinOfTheDead(t *testing.T) {
	s := openOS(t)
	v1, v2 := mustTemplate(t, s, alice, shop, 1), mustTemplate(t, s, alice, shop, 2)
	self := s.self
	s.self.BootID = "an earlier one"
	for _, v := range []TemplateRef{v1, v2} {
		_, err := s.PinTemplate(t.Context(), v, "c")
		must(t, err)
	}
	s.self = self
	_, err := s.Sweep(t.Context())
	must(t, err)
	tidy(t, s)
	if all, err := s.Templates(t.Context()); err != nil || len(all) != 1 || all[0].TemplateRef != v2 {
		t.Errorf("templates %+v, %v, want %v only", all, err, v2)
	}
}

// TestTemplateDamaged: a damaged version is told, is not replaced by pruning
// the one before it, and leaves the way to that one once it is set aside.
func TestTemplateDamaged(t *testing.T) {
	onBoth(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		v1, v2 := mustTemplate(t, s, alice, shop, 1), mustTemplate(t, s, alice, shop, 2)
		must(t, s.replaceFile(filepath.Join(s.versionPath(v2), "spec.dump"), []byte("x")))
		wantIs(t, s.VerifyTemplate(ctx, v2), checkpoint.ErrCorrupt)
		must(t, s.VerifyTemplate(ctx, v1))
		must(t, s.replaceFile(filepath.Join(s.versionPath(v2), checkpoint.ManifestFile), []byte("{")))
		_, err := s.LatestTemplate(ctx, "default", shop)
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.ID != v2.Version {
			t.Errorf("latest: %v", err)
		}
		if removed, err := s.PruneTemplates(ctx); err != nil || len(removed) != 0 {
			t.Errorf("pruned %v, %v", removed, err)
		}
		_, err = s.PinTemplate(ctx, v2, "c")
		wantIs(t, err, checkpoint.ErrCorrupt)
		must(t, s.QuarantineTemplate(ctx, v2, "why", nil))
		m, err := s.LatestTemplate(ctx, "default", shop)
		must(t, err)
		if m.ID != v1.Version {
			t.Errorf("latest is %s, want the first", m.ID)
		}
		// Two containers may find the damage at once.
		one, err := s.PinTemplate(ctx, v1, "one")
		must(t, err)
		two, err := s.PinTemplate(ctx, v1, "two")
		must(t, err)
		must(t, one.Quarantine(ctx, "a", nil))
		must(t, two.Quarantine(ctx, "b", map[string][]byte{"restore.log": nil}))
		tidy(t, s)
		_, err = s.LatestTemplate(ctx, "default", shop)
		wantIs(t, err, checkpoint.ErrNotFound)
		if got, err := s.List(ctx); err != nil || len(got) != 2 || got[0].State != Quarantined || got[1].State != Quarantined {
			t.Errorf("list %+v, %v", got, err)
		}
	})
}

// TestTemplateMisplaced: what lies under another template's name is not used.
func TestTemplateMisplaced(t *testing.T) {
	s := openOS(t)
	v := mustTemplate(t, s, alice, shop, 1)
	mustTemplate(t, s, alice, "bank", 2)
	must(t, s.fs.Rename(s.versionPath(v), s.versionPath(TemplateRef{v.Namespace, "bank", v.Version})))
	_, err := s.PinTemplate(t.Context(), TemplateRef{v.Namespace, "bank", v.Version}, "c")
	wantIs(t, err, checkpoint.ErrCorrupt)
}

// TestTemplateHostileNames: no name reaches a path that is no DNS label.
func TestTemplateHostileNames(t *testing.T) {
	s := openOS(t)
	good := mustTemplate(t, s, alice, shop, 1)
	for _, name := range []string{"", ".", "..", "../..", "a/b", "/etc", "A", "a.b", "a b", "-a", "a-", "a\x00", "é", strings.Repeat("a", 64)} {
		for what, r := range map[string]TemplateRef{
			"name":      {"default", name, good.Version},
			"namespace": {name, shop, good.Version},
			"version":   {"default", shop, checkpoint.ID(name)},
		} {
			t.Run(what+" "+name, func(t *testing.T) {
				_, err := s.PinTemplate(t.Context(), r, "c")
				wantIs(t, err, checkpoint.ErrInvalid)
				wantIs(t, s.RemoveTemplate(t.Context(), r), checkpoint.ErrInvalid)
				wantIs(t, s.VerifyTemplate(t.Context(), r), checkpoint.ErrInvalid)
				wantIs(t, s.QuarantineTemplate(t.Context(), r, "", nil), checkpoint.ErrInvalid)
				if what == "version" {
					return
				}
				_, err = s.LatestTemplate(t.Context(), r.Namespace, r.Name)
				wantIs(t, err, checkpoint.ErrInvalid)
				if what == "namespace" && (name == "" || strings.ContainsAny(name, "/\x00")) || what == "name" && name == "" {
					return // no identity has it, or it means no template
				}
				m := manifestFor(checkpoint.Identity{Namespace: r.Namespace, Key: "k", Container: "c"}, 3)
				m.Template = r.Name
				if err := commit(t.Context(), s, m); err == nil {
					t.Error("it was committed")
				}
			})
		}
	}
	// Strangers in the directories are no templates, and stay.
	for _, name := range []string{"UPPER", "default/UPPER", "default/shop/stranger"} {
		must(t, s.fs.Mkdir(s.path(templatesDir, name), 0o700))
	}
	must(t, put(s.fs, s.path(templatesDir, "file"), nil))
	must(t, put(s.fs, s.path(templatesDir, "default/file"), nil))
	_, err := s.Sweep(t.Context())
	must(t, err)
	if all, err := s.Templates(t.Context()); err != nil || len(all) != 1 || all[0].TemplateRef != good {
		t.Errorf("templates %+v, %v", all, err)
	}
	if _, err := s.fs.Lstat(s.path(templatesDir, "default/shop/stranger")); errors.Is(err, fs.ErrNotExist) {
		t.Error("the stranger was removed")
	}
}
