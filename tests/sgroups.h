// tests/sgroups.h - data_prep: S groups, hydrogen counts, CXSMILES, positions that are none

// The tables are what RDKit 2022.09 gives with OGB's lists, in the notation of prep_describe();
// bond types that are queries are refused here.

#define V2_CN(third) \
    "\n                    2D\n\n  3  2  0  0  0  0  0  0  0  0999 V2000\n" \
    "    0.0000    0.0000    0.0000 C   0  0  0  0  0  0\n" \
    "    1.2000    0.7000    0.0000 N   0  0  0  0  0  0\n" \
    "    2.4000    0.0000    0.0000 " third "   0  0  0  0  0  0\n  1  2  1  0\n  2  3  1  0\n"
#define V2_CNH V2_CN("H")
#define V2_PAIR(first, second, bond) \
    "\n                    2D\n\n  2  1  0  0  0  0  0  0  0  0999 V2000\n" \
    "    0.0000    0.0000    0.0000 " first "\n    1.2000    0.7000    0.0000 " second "\n" \
    "  1  2  " bond "  0\n"
#define V2_PYRROLE \
    "\n                    2D\n\n  5  5  0  0  0  0  0  0  0  0999 V2000\n" \
    "    0.0000    0.0000    0.0000 N   0  0  0  0  0  0\n" \
    "    1.2000    0.7000    0.0000 C   0  0  0  0  0  0\n" \
    "    2.4000    0.0000    0.0000 C   0  0  0  0  0  0\n" \
    "    3.6000    0.7000    0.0000 C   0  0  0  0  0  0\n" \
    "    4.8000    0.0000    0.0000 C   0  0  0  0  0  0\n  1  2  4  0\n  2  3  4  0\n" \
    "  3  4  4  0\n  4  5  4  0\n  5  1  4  0\n"
#define V2_IRON(bond) V2_PAIR("N   0  0  0  0  0  0", "Fe  0  0  0  0  0  0", bond)
#define V2_IMPLICIT_H(type) \
    "M  STY  1   1 " type "\nM  SAL   1  1   1\nM  SDT   1 MRV_IMPLICIT_H                \n" \
    "M  SED   1 IMPL_H1\nM  END\n"
#define V2_DATIVE(bond) \
    "M  STY  1   1 DAT\nM  SAL   1  1   1\nM  SDT   1 MRV_COORDINATE_BOND_TYPE      \n" \
    "M  SED   1 " bond "\nM  END\n"

#define V3_COUNTS \
    "\n\n\n  0  0  0  0  0  0            999 V3000\nM  V30 BEGIN CTAB\nM  V30 COUNTS "
#define V3_CLOSE "M  V30 END CTAB\nM  END\n"
#define V3_PAIR(n_groups, first, second, bond) \
    V3_COUNTS "2 1 " n_groups " 0 0\nM  V30 BEGIN ATOM\nM  V30 1 " first " 0 0 0 0\n" \
    "M  V30 2 " second "\nM  V30 END ATOM\nM  V30 BEGIN BOND\nM  V30 1 " bond " 1 2\n" \
    "M  V30 END BOND\n"
#define V3_CNH(n_groups) \
    V3_COUNTS "3 2 " n_groups " 0 0\nM  V30 BEGIN ATOM\nM  V30 1 C 0 0 0 0\n" \
    "M  V30 2 N 1 1 0 0\nM  V30 3 H 2 0 0 0\nM  V30 END ATOM\nM  V30 BEGIN BOND\n" \
    "M  V30 1 1 1 2\nM  V30 2 1 2 3\nM  V30 END BOND\n"
#define V3_LIST \
    V3_COUNTS "1 0 0 0 0\nM  V30 BEGIN ATOM\nM  V30 1 NOT[C,N] 0 0 0 0\nM  V30 END ATOM\n" V3_CLOSE
#define V3_GROUPS "M  V30 BEGIN SGROUP\n"
#define V3_END "M  V30 END SGROUP\n" V3_CLOSE

static const struct { Format format; const char *rule, *text, *expected; } PREP_SGROUPS[] = {
    {FORMAT_SDF, "no S group: the hydrogen is a count",
     V2_CNH "M  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "a bond across the boundary keeps its hydrogen",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   2\nM  SBL   1  1   2\nM  SMT   1 NH\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "so it does from outside",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   3\nM  SBL   1  1   2\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "a bond inside does not",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  2   2   3\nM  SBL   1  1   2\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "a group of one hydrogen is not emptied",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   3\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "a group with another atom gives it up",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  2   2   3\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "an attachment atom stays",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  2   2   3\nM  SAP   1  1   3   0  1\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "one that leaves does not",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   2\nM  SAP   1  1   2   3  1\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "a bond that is drawn as crossing",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   2\nM  SBL   1  1   2\n"
     "M  SBV   1   2    1.0000    0.0000\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "ids in any order",
     V2_CNH "M  STY  2   7 SUP   2 DAT\nM  SAL   7  1   3\nM  SAL   2  1   1\nM  SDT   2 x\n"
     "M  SED   2 y\nM  END\n",
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "a group that is not announced is passed over",
     V2_CNH "M  SAL   1  1   3\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "a bond of a group with none of its atoms",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   1\nM  SBL   1  1   2\nM  END\n",
     "refused"},
    {FORMAT_SDF, "the same, and no hydrogen to ask for",
     V2_CN("O") "M  STY  1   1 SUP\nM  SAL   1  1   1\nM  SBL   1  1   2\nM  END\n",
     "C04530200 N03510200 O02510200 0-1:000 1-2:000"},
    {FORMAT_SDF, "aromatic nitrogen without its hydrogen",
     V2_PYRROLE "M  END\n",
     "refused"},
    {FORMAT_SDF, "MRV_IMPLICIT_H gives it",
     V2_PYRROLE V2_IMPLICIT_H("DAT"),
     "N03510111 C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 4-0:301"},
    {FORMAT_SDF, "only to atoms with aromatic bonds",
     V2_PAIR("N   0  0  0  0  0  0", "C   0  0  0  0  0  0", "1") V2_IMPLICIT_H("DAT"),
     "N03520200 C04530200 0-1:000"},
    {FORMAT_SDF, "bond type 8",
     V2_IRON("8") "M  END\n",
     "refused"},
    {FORMAT_SDF, "MRV_COORDINATE_BOND_TYPE makes it dative",
     V2_IRON("8") V2_DATIVE("1"),
     "N04530300 Fe01500200 0-1:400"},
    {FORMAT_SDF, "of another bond",
     V2_IRON("8") V2_DATIVE("2"),
     "refused"},
    {FORMAT_SDF, "of no number",
     V2_IRON("1") V2_DATIVE("x"),
     "refused"},
    {FORMAT_SDF, "a zero-order bond becomes dative too",
     V2_IRON("0") V2_DATIVE("1"),
     "N04530300 Fe01500200 0-1:400"},
    {FORMAT_SDF, "data with another type of group",
     V2_PYRROLE V2_IMPLICIT_H("GEN"),
     "refused"},
    {FORMAT_SDF, "unknown type",
     V2_CNH "M  STY  1   1 XYZ\nM  END\n",
     "refused"},
    {FORMAT_SDF, "connection in small letters",
     V2_CNH "M  STY  1   1 SRU\nM  SCN  1   1 ht \nM  END\n",
     "refused"},
    {FORMAT_SDF, "short SAP",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   2\nM  SAP   1  1   2   0\nM  END\n",
     "refused"},
    {FORMAT_SDF, "short SAL",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  2   2\nM  END\n",
     "refused"},
    {FORMAT_SDF, "short STY",
     V2_CNH "M  STY  2   1 SUP\nM  END\n",
     "refused"},
    {FORMAT_SDF, "an atom that is not there",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   4\nM  END\n",
     "refused"},
    {FORMAT_SDF, "a bond that is not there",
     V2_CNH "M  STY  1   1 SUP\nM  SBL   1  1   3\nM  END\n",
     "refused"},
    {FORMAT_SDF, "a leaving atom that is not there",
     V2_CNH "M  STY  1   1 SUP\nM  SAL   1  1   2\nM  SAP   1  1   2   4  1\nM  END\n",
     "refused"},
    {FORMAT_SDF, "an atom of a paragon outside the group",
     V2_CNH "M  STY  1   1 MUL\nM  SAL   1  1   2\nM  SPA   1  1   1\nM  END\n",
     "refused"},
    {FORMAT_SDF, "data of two groups at once",
     V2_CNH "M  STY  2   1 DAT   2 DAT\nM  SCD   1 a\nM  SED   2 b\nM  END\n",
     "refused"},
    {FORMAT_SDF, "data in four lines",
     V2_CNH "M  STY  1   1 DAT\nM  SDT   1 n\nM  SCD   1 a\nM  SCD   1 a\nM  SCD   1 a\n"
     "M  SED   1 b\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "data in five lines",
     V2_CNH "M  STY  1   1 DAT\nM  SDT   1 n\nM  SCD   1 a\nM  SCD   1 a\nM  SCD   1 a\n"
     "M  SCD   1 a\nM  SED   1 b\nM  END\n",
     "refused"},
    {FORMAT_SDF, "M  PXA of an atom",
     V2_CNH "M  PXA   1    0.0000    0.0000    0.0000 H\nM  END\n",
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "M  PXA of none",
     V2_CNH "M  PXA   9    0.0000    0.0000    0.0000 H\nM  END\n",
     "refused"},
    {FORMAT_SDF, "M  PXA without a number",
     V2_CNH "M  PXA\nM  END\n",
     "refused"},
    {FORMAT_SDF, "V3000: a crossing bond",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 2) XBONDS=(1 2) LABEL=\"N H\"\n" V3_END,
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "V3000: a group of one hydrogen",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 3)\n" V3_END,
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "V3000: attachment",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(2 2 3) SAP=(3 3 0 1) LABEL=\"\"\"\"\n" V3_END,
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "V3000: leaving",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 2) SAP=(3 2 aidx Al)\n" V3_END,
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "V3000: CSTATE",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 2) XBONDS=(1 2) CSTATE=(4 2 1.5 0 0)\n"
     V3_END,
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "V3000: CSTATE of a bond inside",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(2 2 3) XBONDS=(1 2) CSTATE=(4 2 1 0 0)\n"
     V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: two lines",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 2) -\nM  V30 XBONDS=(1 2)\n" V3_END,
     "C04530200 N03510200 H01500500 0-1:000 1-2:000"},
    {FORMAT_SDF, "V3000: MRV_IMPLICIT_H",
     V3_COUNTS "5 5 1 0 0\nM  V30 BEGIN ATOM\nM  V30 1 N 0 0 0 0\nM  V30 2 C 1 1 0 0\n"
     "M  V30 3 C 2 0 0 0\nM  V30 4 C 3 1 0 0\nM  V30 5 C 4 0 0 0\nM  V30 END ATOM\n"
     "M  V30 BEGIN BOND\nM  V30 1 4 1 2\nM  V30 2 4 2 3\nM  V30 3 4 3 4\nM  V30 4 4 4 5\n"
     "M  V30 5 4 5 1\nM  V30 END BOND\n" V3_GROUPS
     "M  V30 1 DAT 0 ATOMS=(1 1) FIELDNAME=MRV_IMPLICIT_H FIELDDATA=IMPL_H1\n" V3_END,
     "N03510111 C03510111 C03510111 C03510111 C03510111 0-1:301 1-2:301 2-3:301 3-4:301 "
     "4-0:301"},
    {FORMAT_SDF, "V3000: MRV_COORDINATE_BOND_TYPE",
     V3_PAIR("1", "N", "Fe 1 1 0 0", "8") V3_GROUPS
     "M  V30 1 DAT 0 ATOMS=(1 1) FIELDNAME=\"MRV_COORDINATE_BOND_TYPE\" FIELDDATA=\"1\"\n" V3_END,
     "N04530300 Fe01500200 0-1:400"},
    {FORMAT_SDF, "V3000: bond type 8",
     V3_PAIR("0", "N", "Fe 1 1 0 0", "8") V3_CLOSE,
     "refused"},
    {FORMAT_SDF, "V3000: connection in small letters",
     V3_CNH("1") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1) CONNECT=ht\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: connection",
     V3_CNH("1") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1) CONNECT=HT\n" V3_END,
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "V3000: no END SGROUP",
     V3_CNH("1") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1)\nM  V30 END CTAB\nM  END\n",
     "refused"},
    {FORMAT_SDF, "V3000: more groups than counted",
     V3_CNH("1") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1)\nM  V30 2 SRU 0 ATOMS=(1 2)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: fewer",
     V3_CNH("2") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: not counted, not read",
     V3_CNH("0") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 3)\n" V3_END,
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "V3000: one id twice",
     V3_CNH("2") V3_GROUPS "M  V30 1 SRU 0 ATOMS=(1 1)\nM  V30 1 SRU 0 ATOMS=(1 2)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: short SAP",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 2) SAP=(3 2)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: short list",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(3 1 2) LABEL=x\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: long list",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 1 2)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: an atom that is not there",
     V3_CNH("1") V3_GROUPS "M  V30 1 SUP 0 ATOMS=(1 4)\n" V3_END,
     "refused"},
    {FORMAT_SDF, "V3000: a plus is no sign",
     V3_PAIR("0", "C", "N 1 1 0 0 CHG=+1", "1") V3_CLOSE,
     "C04530200 N03520200 0-1:000"},
    {FORMAT_SDF, "V3000: a charge",
     V3_PAIR("0", "C", "N 1 1 0 0 CHG=1", "1") V3_CLOSE,
     "C04530200 N04630200 0-1:000"},
    {FORMAT_SDF, "a hydrogen count keeps hydrogen",
     V2_PAIR("F   0  0  0  3  0  0", "H   0  0  0  1  0  0", "1") "M  END\n",
     "F01500200 H01500500 0-1:000"},
    {FORMAT_SDF, "of zero does not",
     V2_PAIR("F   0  0  0  0  0  0", "H   0  0  0  0  0  0", "1") "M  END\n",
     "F01510200"},
    {FORMAT_SDF, "takes implicit hydrogens away",
     V2_PAIR("C   0  0  0  2  0  0", "C   0  0  0  0  0  0", "1") "M  END\n",
     "C01503200 C04530200 0-1:000"},
    {FORMAT_SDF, "of a charged atom",
     V2_PAIR("N   0  0  0  1  0  0", "C   0  0  0  4  0  0", "1") "M  CHG  1   1   1\n"
     "M  END\n",
     "N01603200 C01503200 0-1:000"},
    {FORMAT_SDF, "with a valence field",
     V2_PAIR("C   0  0  0  2  0  4", "C   0  0  0  0  0  0", "1") "M  END\n",
     "C04530200 C04530200 0-1:000"},
    {FORMAT_SDF, "of a deuterium",
     V2_PAIR("D   0  0  0  1  0  0", "O   0  0  0  0  0  0", "1") "M  END\n",
     "H01500500 O02510200 0-1:000"},
    {FORMAT_SDF, "below zero says nothing",
     V2_PAIR("C   0  0  0 -1  0  0", "C   0  0  0  0  0  0", "1") "M  END\n",
     "C04530200 C04530200 0-1:000"},
    {FORMAT_SMI, "radical",
     "CC |^1:0|",
     "C03521200 C04530200 0-1:000"},
    {FORMAT_SMI, "two of them, a diradical",
     "CCC |^1:0,2,^3:1|",
     "C03521200 C02502200 C03521200 0-1:000 1-2:000"},
    {FORMAT_SMI, "dative bond",
     "C[Fe]N |C:2.1|",
     "C04530200 Fe02500300 N04530300 0-1:000 2-1:400"},
    {FORMAT_SMI, "hydrogen bond",
     "CC.O |H:1.0|",
     "C05540300 C05540300 O02520200 1-0:400"},
    {FORMAT_SMI, "wavy bond",
     "CC=CC(C)N |(-1.98,-0.08,;-2.87,0.72,;-3.69,0.72,;-4.41,1.13,;-5.16,0.80,;-4.2,2,),w:1.0|",
     "C04530200 C03510100 C03510100 C04510200 C04530200 N03520200 1-0:000 1-2:150 2-3:000 "
     "3-4:000 3-5:000"},
    {FORMAT_SMI, "wavy bond takes a centre",
     "N[C@@H](C)C(=O)O |w:1.0|",
     "N03520200 C04510200 C04530200 C03500100 O01500100 O02510100 1-0:000 1-2:000 1-3:000 "
     "3-4:101 3-5:001"},
    {FORMAT_SMI, "and directions",
     "C/C=C/C |w:1.0|",
     "C04530200 C03510100 C03510100 C04530200 1-0:000 1-2:100 2-3:000"},
    {FORMAT_SMI, "either double bond",
     "C/C=C/C |ctu:1|",
     "C04530200 C03510100 C03510100 C04530200 0-1:000 1-2:150 2-3:000"},
    {FORMAT_SMI, "cis says nothing without coordinates",
     "CC=CC |c:1|",
     "C04530200 C03510100 C03510100 C04530200 0-1:000 1-2:100 2-3:000"},
    {FORMAT_SMI, "coordinates of a drawing",
     "CC=CC |(0,0,;1,0.5,;2,0.5,;3,0,),c:1|",
     "C04530200 C03510100 C03510100 C04530200 0-1:000 1-2:110 2-3:000"},
    {FORMAT_SMI, "wedge",
     "CC(F)(Cl)Br |(-1.3,-0.75,;0,0,;1.3,0.75,;0.75,-1.3,;-0.75,1.3,),wU:1.0|",
     "C04530200 C14500200 F01500200 Cl01500200 Br01500200 1-0:000 1-2:000 1-3:000 1-4:000"},
    {FORMAT_SMI, "the other wedge",
     "CC(F)(Cl)Br |(-1.3,-0.75,;0,0,;1.3,0.75,;0.75,-1.3,;-0.75,1.3,),wD:1.0|",
     "C04530200 C24500200 F01500200 Cl01500200 Br01500200 1-0:000 1-2:000 1-3:000 1-4:000"},
    {FORMAT_SMI, "a wedge without coordinates",
     "CC(F)(Cl)Br |wU:1.0|",
     "C04530200 C04500200 F01500200 Cl01500200 Br01500200 1-0:000 1-2:000 1-3:000 1-4:000"},
    {FORMAT_SMI, "coordinates in space",
     "CC(F)(Cl)Br |(-1,-1,-1;0,0,0;1,1,-1;1,-1,1;-1,1,1)|",
     "C04530200 C24500200 F01500200 Cl01500200 Br01500200 0-1:000 1-2:000 1-3:000 1-4:000"},
    {FORMAT_SMI, "ring bonds are counted where they close",
     "C1CC1[Fe]N |C:4.4|",
     "C04520201 C04520201 C04510201 Fe02500300 N04530300 0-1:000 1-2:000 2-3:000 4-3:400 "
     "2-0:000"},
    {FORMAT_SMI, "an index too large is passed over",
     "CC |^1:7|",
     "C04530200 C04530200 0-1:000"},
    {FORMAT_SMI, "what is not read",
     "CC |$R;$,atomProp:0.a.b,&1:1,SgD:0:a:b::::,Sg:n:0::ht,rb:0:*,^1:1|",
     "C04530200 C03521200 0-1:000"},
    {FORMAT_SMI, "an open extension",
     "CC |^1:0",
     "refused"},
    {FORMAT_SMI, "of no number",
     "CC |^1:|",
     "refused"},
    {FORMAT_SMI, "radical 8",
     "CC |^8:0|",
     "refused"},
    {FORMAT_SMI, "a bond elsewhere",
     "CCC |C:0.1|",
     "refused"},
    {FORMAT_SMI, "two wedges on one bond",
     "CC(F)(Cl)Br |wU:1.0,wD:1.0|",
     "refused"},
    {FORMAT_SMI, "bad coordinate",
     "CC |(0,x,;1,1,)|",
     "refused"},
    {FORMAT_SMI, "open label",
     "CC |$a;b|",
     "refused"},
    {FORMAT_SMI, "empty",
     "CC ||",
     "C04530200 C04530200 0-1:000"},
    {FORMAT_SMI, "a name with bars is none",
     "CC |my name|",
     "refused"},
};

// The table, names behind an extension, and what is noted of records that are kept.
static void test_sgroups(void) {
    static const char mol[] =
        "%s\n                    3D\n\n  3  2  0  0  0  0  0  0  0  0999 V2000\n"
        "%s C   0  0\n%s O   0  0\n%s H   0  0\n  1  2  1  0\n  2  3  1  0\nM  END\n$$$$\n";
    static const char *const at[] = {"    0.0000    0.0000    0.0000",
                                     "    1.4000    0.0000    0.0000",
                                     "    1.4004    0.0004    0.0000"};
    static const struct { const char *name; int x[3]; } where[] = {
        {"fine", {0, 1, 2}}, {"all", {0, 0, 0}}, {"all but", {1, 2, 0}}, {"heavy", {1, 1, 0}}};
    Worker w = {0};
    Outcome o;
    for (size_t k = 0; k < sizeof PREP_SGROUPS / sizeof PREP_SGROUPS[0]; k++)
        prep_expect(&w, PREP_SGROUPS[k].format, PREP_SGROUPS[k].rule, PREP_SGROUPS[k].text,
                    PREP_SGROUPS[k].expected);
    static const char *const named[][2] = {
        {"CC |^1:0| ethyl", "ethyl"}, {"CC |$a|b;$| a name", "a name"}, {"CC |^1:0|", "CC"},
        {"CC ethane |^1:0|", "ethane |^1:0|"}};
    for (int k = 0; k < 4; k++) {
        int kept = prep_convert(&w, FORMAT_SMI, named[k][0], &o);
        test_check(kept && span_is(o.name, named[k][1]), "%s: the name is \"%.*s\"", named[k][0],
                   o.name.n, o.name.p);
    }
    prep_convert(&w, FORMAT_SDF, V3_LIST, &o);
    test_check(o.fault.kind && strstr(o.fault.kind, "query"), "NOT[...] is a query: %s",
               o.fault.text);
    Text sdf = {0};
    for (int k = 0; k < 4; k++) {
        const int *x = where[k].x;
        text_add(&sdf, mol, where[k].name, at[x[0]], at[x[1]], at[x[2]]);
    }
    write_bytes("build/test_places.sdf", sdf.text, sdf.length);
    free(sdf.text);
    test_command("./data_prep -o build/test_places.bin build/test_places.sdf", 0, "kept 4");
    test_command("./data_prep -o build/test_places.bin build/test_places.sdf", 0,
                 "note       3  positions left out: no geometry\n"
                 "          build/test_places.sdf:12: atoms 1 and 2 are in one place\n");
    test_command("./data_prep --dump build/test_places.bin --range 1:3", 0, "\"pos\":null");
    test_command("./data_prep --dump build/test_places.bin --range 0:1", 0,
                 "\"pos\":[[0,0,0],[1.39");
    test_table("build/test_cx.smi", "CC |$a;b$,^1:0| x\nCO |&1:0,SgD:0:a:b::::| y\nCO z\n",
               "./data_prep -o build/test_cx.bin build/test_cx.smi", 0,
               "note       2  CXSMILES extensions not read as a whole\n"
               "          build/test_cx.smi:1: not read: atom labels\n"
               "          build/test_cx.smi:2: not read: stereo groups, S groups\n");
    worker_free(&w);
}
