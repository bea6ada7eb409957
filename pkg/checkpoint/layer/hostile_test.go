package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// build makes an archive of these headers, owned by the user who runs the test
// unless they say otherwise; a file's body is zeros.
func build(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		if h.Typeflag != tar.TypeXGlobalHeader && h.Uid == 0 && h.Gid == 0 {
			h.Uid, h.Gid = os.Geteuid(), os.Getegid()
		}
		must(t, tw.WriteHeader(h))
		if h.Typeflag == tar.TypeReg {
			_, err := tw.Write(make([]byte, h.Size))
			must(t, err)
		}
	}
	must(t, tw.Close())
	return b.Bytes()
}

func global(key, value string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{key: value}}
}

func rootHeader() *tar.Header { return &tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755} }

// whole puts the headers where entries of a layer belong.
func whole(t testing.TB, headers ...*tar.Header) []byte {
	hs := append([]*tar.Header{global(recordVersion, formatVersion), rootHeader()}, headers...)
	return build(t, append(hs, global(recordEnd, fmt.Sprint(len(headers)+1)))...)
}

func file(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600}
}

func sparseFile(size int64, sparse string) *tar.Header {
	h := file("f")
	h.Size = size
	h.PAXRecords = map[string]string{recordSparse: sparse}
	return h
}

func withXattr(h *tar.Header, name, value string) *tar.Header {
	h.PAXRecords = map[string]string{recordXattr + name: value}
	return h
}

func TestHostile(t *testing.T) {
	base := t.TempDir()
	outside := write(t, base, "outside/file", "secret")
	symlink := func(name, target string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
	}
	link := func(name, target string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
	}
	directory := func(name string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o700}
	}
	long := strings.Repeat("a/", 2100) + "f"
	many := "99999999" + strings.Repeat(";0,1", maxSegments+1)
	tests := map[string]struct {
		layer []byte
		want  error
	}{
		"no layer":                {build(t, rootHeader()), checkpoint.ErrCorrupt},
		"empty":                   {nil, checkpoint.ErrCorrupt},
		"garbage":                 {bytes.Repeat([]byte("x"), 4096), checkpoint.ErrCorrupt},
		"other version":           {build(t, global(recordVersion, "2"), rootHeader(), global(recordEnd, "1")), checkpoint.ErrCorrupt},
		"no root":                 {build(t, global(recordVersion, formatVersion), file("f"), global(recordEnd, "1")), checkpoint.ErrCorrupt},
		"root twice":              {whole(t, rootHeader()), checkpoint.ErrCorrupt},
		"root is a file":          {build(t, global(recordVersion, formatVersion), file("."), global(recordEnd, "1")), checkpoint.ErrCorrupt},
		"no end":                  {build(t, global(recordVersion, formatVersion), rootHeader(), file("f")), checkpoint.ErrCorrupt},
		"wrong end":               {build(t, global(recordVersion, formatVersion), rootHeader(), file("f"), global(recordEnd, "3")), checkpoint.ErrCorrupt},
		"second start":            {whole(t, global(recordVersion, formatVersion)), checkpoint.ErrCorrupt},
		"absolute":                {whole(t, file(outside)), checkpoint.ErrCorrupt},
		"dot dot":                 {whole(t, file("../outside/new")), checkpoint.ErrCorrupt},
		"dot dot within":          {whole(t, directory("a/"), file("a/../../outside/new")), checkpoint.ErrCorrupt},
		"dot dot alone":           {whole(t, directory("../")), checkpoint.ErrCorrupt},
		"unclean":                 {whole(t, directory("a/"), file("a//f")), checkpoint.ErrCorrupt},
		"leading dot":             {whole(t, file("./f")), checkpoint.ErrCorrupt},
		"long path":               {whole(t, file(long)), checkpoint.ErrCorrupt},
		"no parent":               {whole(t, file("a/f")), checkpoint.ErrCorrupt},
		"parent is a file":        {whole(t, file("a"), file("a/f")), checkpoint.ErrCorrupt},
		"parent is a symlink":     {whole(t, symlink("a", "../outside"), file("a/new")), checkpoint.ErrCorrupt},
		"grandparent is one":      {whole(t, symlink("a", "../outside"), directory("a/d"), file("a/d/f")), checkpoint.ErrCorrupt},
		"over a symlink":          {whole(t, symlink("a", outside), file("a")), checkpoint.ErrCorrupt},
		"directory over symlink":  {whole(t, symlink("a", "../outside"), directory("a/")), checkpoint.ErrCorrupt},
		"left directory":          {whole(t, directory("a/"), directory("b/"), file("a/f")), checkpoint.ErrCorrupt},
		"twice":                   {whole(t, file("f"), file("f")), checkpoint.ErrCorrupt},
		"symlink to nothing":      {whole(t, symlink("a", "")), checkpoint.ErrCorrupt},
		"symlink too long":        {whole(t, symlink("a", strings.Repeat("x", 4096))), checkpoint.ErrCorrupt},
		"link outside":            {whole(t, link("a", "../outside/file")), checkpoint.ErrCorrupt},
		"link to absolute":        {whole(t, link("a", outside)), checkpoint.ErrCorrupt},
		"link through symlink":    {whole(t, symlink("s", "../outside"), link("a", "s/file")), checkpoint.ErrCorrupt},
		"link to a directory":     {whole(t, directory("d/"), link("a", "d")), checkpoint.ErrCorrupt},
		"link to the root":        {whole(t, link("a", ".")), checkpoint.ErrCorrupt},
		"link to nothing":         {whole(t, link("a", "b")), checkpoint.ErrCorrupt},
		"link to itself":          {whole(t, link("a", "a")), checkpoint.ErrCorrupt},
		"device":                  {whole(t, &tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}), checkpoint.ErrInvalid},
		"block device 0:0":        {whole(t, &tar.Header{Typeflag: tar.TypeBlock, Name: "b"}), checkpoint.ErrInvalid},
		"device number":           {whole(t, &tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1 << 12}), checkpoint.ErrCorrupt},
		"contiguous file":         {whole(t, &tar.Header{Typeflag: tar.TypeCont, Name: "c"}), checkpoint.ErrCorrupt},
		"mode":                    {whole(t, &tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o100644}), checkpoint.ErrCorrupt},
		"owner -1":                {whole(t, &tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1<<32 - 1}), checkpoint.ErrCorrupt},
		"group too large":         {whole(t, &tar.Header{Typeflag: tar.TypeReg, Name: "f", Gid: 1 << 40}), checkpoint.ErrCorrupt},
		"sparse overlap":          {whole(t, sparseFile(20, "100;0,10;9,10")), checkpoint.ErrCorrupt},
		"sparse out of order":     {whole(t, sparseFile(20, "100;50,10;0,10")), checkpoint.ErrCorrupt},
		"sparse beyond the end":   {whole(t, sparseFile(20, "100;90,20")), checkpoint.ErrCorrupt},
		"sparse overflow":         {whole(t, sparseFile(20, "9223372036854775807;9223372036854775800,20")), checkpoint.ErrCorrupt},
		"sparse size overflow":    {whole(t, sparseFile(0, "9223372036854775808")), checkpoint.ErrCorrupt},
		"sparse negative":         {whole(t, sparseFile(20, "100;-10,20")), checkpoint.ErrCorrupt},
		"sparse sum too small":    {whole(t, sparseFile(20, "100;0,10")), checkpoint.ErrCorrupt},
		"sparse sum too large":    {whole(t, sparseFile(20, "100;0,30")), checkpoint.ErrCorrupt},
		"sparse without a number": {whole(t, sparseFile(0, "a")), checkpoint.ErrCorrupt},
		"sparse without a comma":  {whole(t, sparseFile(0, "10;1")), checkpoint.ErrCorrupt},
		"sparse empty":            {whole(t, sparseFile(0, "")), checkpoint.ErrCorrupt},
		"sparse empty segment":    {whole(t, sparseFile(0, "10;0,0")), checkpoint.ErrCorrupt},
		"sparse too many":         {whole(t, sparseFile(maxSegments+1, many)), checkpoint.ErrCorrupt},
		"xattr selinux":           {whole(t, withXattr(file("f"), "security.selinux", "x")), checkpoint.ErrCorrupt},
		"xattr trusted":           {whole(t, withXattr(file("f"), "trusted.other", "x")), checkpoint.ErrCorrupt},
		"xattr origin":            {whole(t, withXattr(file("f"), "trusted.overlay.origin", "x")), checkpoint.ErrCorrupt},
		"xattr upper escaped not": {whole(t, withXattr(file("f"), "trusted.overlay.overlay.", "x")), checkpoint.ErrCorrupt},
		"xattr user without name": {whole(t, withXattr(file("f"), "user.", "x")), checkpoint.ErrCorrupt},
		"xattr long name":         {whole(t, withXattr(file("f"), "user."+strings.Repeat("x", 255), "x")), checkpoint.ErrCorrupt},
		"xattr long value":        {whole(t, withXattr(file("f"), "user.x", strings.Repeat("x", maxXattrValue+1))), checkpoint.ErrCorrupt},
		"xattr opaque":            {whole(t, withXattr(file("f"), "trusted.overlay.opaque", "z")), checkpoint.ErrCorrupt},
		"xattr redirect up":       {whole(t, withXattr(directory("d/"), "trusted.overlay.redirect", "../up")), checkpoint.ErrCorrupt},
		"xattr redirect up 2":     {whole(t, withXattr(directory("d/"), "trusted.overlay.redirect", "/a/../../up")), checkpoint.ErrCorrupt},
		"xattr redirect to root":  {whole(t, withXattr(directory("d/"), "trusted.overlay.redirect", "/")), checkpoint.ErrCorrupt},
		"xattr redirect deep":     {whole(t, withXattr(directory("d/"), "trusted.overlay.redirect", "a/b")), checkpoint.ErrCorrupt},
		"xattr protattr":          {whole(t, withXattr(file("f"), "trusted.overlay.protattr", "x")), checkpoint.ErrCorrupt},
		"xattr metacopy":          {whole(t, withXattr(file("f"), "trusted.overlay.metacopy", strings.Repeat("x", 69))), checkpoint.ErrCorrupt},
		"entries":                 {whole(t, slices.Repeat([]*tar.Header{directory("d/")}, 101)...), checkpoint.ErrCorrupt},
		"bytes":                   {whole(t, &tar.Header{Typeflag: tar.TypeReg, Name: "f", Size: 1001, Mode: 0o600}), checkpoint.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			dir := filepath.Join(base, "in")
			must(t, os.Mkdir(dir, 0o755))
			defer os.RemoveAll(dir)
			before := describe(t, base)
			a, err := Apply(context.Background(), bytes.NewReader(tt.layer), dir, Options{MaxBytes: 1000, MaxEntries: 100})
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			must(t, a.Undo())
			compare(t, describe(t, base), before)
		})
	}
}

func TestBounds(t *testing.T) {
	dir := t.TempDir()
	for i := range 9 {
		write(t, dir, fmt.Sprint(i), "0123456789")
	}
	layer, _ := capture(t, dir)
	for _, tt := range []struct {
		opt Options
		ok  bool
	}{
		{Options{MaxEntries: 10, MaxBytes: 90}, true},
		{Options{MaxEntries: 9}, false},
		{Options{MaxBytes: 89}, false},
	} {
		a, err := Apply(context.Background(), bytes.NewReader(layer), t.TempDir(), tt.opt)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("%+v: %v", tt.opt, err)
		}
		must(t, a.Undo())
	}
}

// TestGNUSparse: archive/tar would expand GNU's sparse formats by itself.
func TestGNUSparse(t *testing.T) {
	layer := whole(t, sparseFile(0, "7777"))
	// Go's writer refuses the key; one of the same length takes its place.
	hacked := bytes.Replace(layer, []byte("STASIS.sparse=7777"), []byte("GNU.sparse.size=77"), 1)
	if bytes.Equal(layer, hacked) {
		t.Fatal("no such record")
	}
	if _, err := Apply(context.Background(), bytes.NewReader(hacked), t.TempDir(), Options{}); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("%v", err)
	}
}

func TestAllowDevices(t *testing.T) {
	testenv.Need(t, testenv.Root)
	dir := t.TempDir()
	layer := whole(t, &tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666})
	apply(t, layer, dir, Options{AllowDevices: true})
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(dir, "null"), &st))
	if st.Mode != unix.S_IFCHR|0o666 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("mode %o, device %#x", st.Mode, st.Rdev)
	}
}

// FuzzApply: whatever the input, nothing outside the directory changes, Undo
// gives back the directory that was there, and what was accepted can be
// captured and converted.
func FuzzApply(f *testing.F) {
	small := f.TempDir()
	write(f, small, "d/f", "content")
	must(f, os.Symlink("../..", filepath.Join(small, "s")), os.Link(filepath.Join(small, "d/f"), filepath.Join(small, "l")),
		os.WriteFile(filepath.Join(small, "hole"), nil, 0o600), os.Truncate(filepath.Join(small, "hole"), 1<<20))
	setxattr(f, filepath.Join(small, "d"), "user.x", "y")
	layer, _ := capture(f, small)
	f.Add(layer, false)
	f.Add(layer, true)
	f.Add(layer[:len(layer)/2], false)
	f.Add(whole(f, &tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "../outside"}, file("a/new")), true)
	f.Add(whole(f, sparseFile(20, "100;0,10;50,10")), false)
	f.Add(whole(f, &tar.Header{Typeflag: tar.TypeChar, Name: "w"}), false)
	if fi, err := os.Stat("/dev/shm"); err == nil && fi.IsDir() {
		f.Setenv("TMPDIR", "/dev/shm") // a disk would make it slow
	}
	f.Add(whole(f, file("d/f")), true)
	f.Fuzz(func(t *testing.T, layer []byte, skip bool) {
		base := t.TempDir()
		dir := filepath.Join(base, "in")
		write(t, base, "outside/file", "secret")
		must(t, os.Mkdir(dir, 0o755), os.Symlink("../outside", filepath.Join(dir, "link")))
		write(t, dir, "d/old", "old")
		before := describe(t, base)
		a, err := Apply(context.Background(), bytes.NewReader(layer), dir, Options{SkipExisting: skip, MaxBytes: 1 << 20, MaxEntries: 100})
		if err == nil {
			if os.Geteuid() == 0 {
				var again bytes.Buffer
				if _, err := Capture(context.Background(), &again, dir); err != nil {
					t.Errorf("capture of what was applied: %v", err)
				}
			}
		}
		// Modes may forbid a look, the root user excepted.
		if err := a.Undo(); err != nil && os.Geteuid() == 0 {
			t.Errorf("undo: %v", err)
		}
		if after := describe(t, base); !slices.Equal(before, after) {
			compare(t, after, before)
		}
	})
}
